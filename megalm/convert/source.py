"""A model being converted: its configuration, its weights under global names, and the files that belong to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.rules import Rule
from megalm.convert.weights import WeightReader


@dataclass
class OptimizerState:
    """AdamW's state under the weights' own names: fp32 weights, first and second moments, and the updates made.

    The settings are those that the updates were made with; Megatron's loader wants them beside the state.
    """

    weights: WeightReader
    exp_avg: WeightReader
    exp_avg_sq: WeightReader
    step: int
    tokens: int = 0
    lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def parts(self) -> dict[str, WeightReader]:
        """The three by the prefix that a checkpoint of megalm's gives their names."""
        return {"": self.weights, "optimizer.exp_avg.": self.exp_avg, "optimizer.exp_avg_sq.": self.exp_avg_sq}


class StateWeights:
    """An OptimizerState as one set of tensors, named as a checkpoint of megalm's names them."""

    def __init__(self, state: OptimizerState):
        self._places = {
            prefix + name: (reader, name) for prefix, reader in state.parts().items() for name in reader.names()
        }

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        reader, own = self._places[name]
        return reader.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        reader, own = self._places[name]
        return reader.dtype(own)

    def read(self, name: str) -> Tensor:
        reader, own = self._places[name]
        return reader.read(own)


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card says of a run."""

    name: str
    step: int
    tokens: int
    data: tuple[str, ...]
    """Prefixes of the data sets, with their weights where they have some."""
    loss: float | None
    eval_loss: float | None
    begun_from: str | None
    """The run or folder whose weights it began with."""
    optimizer: str
    sequence_length: int
    version: str


@dataclass
class Source:
    """What every reader of a format returns, and every writer takes.

    `weights` has the model's global tensors; `ignored` says which foreign tensors were left out and why. `files` are
    the tokenizer's and generation's files, `tokenizer` the file or folder that its tokenizer is loaded from; `config_json`
    is the Hugging Face config.json the model came with, where it did.
    """

    path: Path | str
    format: str
    model: ModelConfig
    weights: WeightReader
    foreign_count: int
    ignored: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    tokenizer: Path | None = None
    config_json: dict[str, Any] | None = None
    step: int = 0
    optimizer: OptimizerState | None = None
    """Where it is stored in a form that can be converted."""
    training: TrainingFacts | None = None
    """How it was trained, for a run that was."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how the folder was read, in sentences."""


class RuleReader:
    """Global tensors, read through a table of rules from the foreign tensors they are stored in.

    Every foreign tensor is read once when the names are asked for in the table's order.
    """

    def __init__(self, foreign: WeightReader, rules: Iterable[Rule]):
        self._foreign = foreign
        self._rules: dict[str, tuple[Rule, int]] = {}
        for rule in rules:
            for position, part in enumerate(rule.parts):
                self._rules[part.name] = (rule, position)
        self._last: tuple[str, list[Tensor]] = ("", [])

    def names(self) -> list[str]:
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        rule, position = self._rules[name]
        return rule.parts[position].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._foreign.dtype(self._rules[name][0].foreign)

    def read(self, name: str) -> Tensor:
        rule, position = self._rules[name]
        if self._last[0] != rule.foreign:
            self._last = ("", [])  # let go of the previous tensor before the next one is read
            self._last = (rule.foreign, rule.split(self._foreign.read(rule.foreign)))
        return self._last[1][position]


def check_shapes(where: Path | str, weights: WeightReader, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are missing or have another shape than the configuration says, by their first names."""
    there = set(weights.names())
    missing = [name for name in expected if name not in there]
    if missing:
        raise ConfigError(
            f"{where}: {len(missing)} tensors are missing: {_first(missing)}. "
            "Copy the whole checkpoint, or correct its configuration."
        )
    wrong = [
        f"{name} is {list(weights.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if weights.shape(name) != shape
    ]
    if wrong:
        raise ConfigError(
            f"{where}: {len(wrong)} tensors do not have the shape that the configuration asks for: {_first(wrong)}"
        )


def check_none_left(where: Path | str, left: Sequence[str]) -> None:
    """Refuse tensors that are left over: the model would not be the one that was trained."""
    if left:
        raise ConfigError(
            f"{where}: {len(left)} tensors have no place in this model: {_first(sorted(left))}. Nothing was written."
        )


def drop_tied_output(
    where: Path | str, files: WeightReader, left: set[str], ignored: dict[str, str], *, output: str, embedding: str
) -> None:
    """Take the output matrix of a model that ties it to its embedding from what is left over; refuse another one."""
    if output not in left:
        return
    if not torch.equal(files.read(output), files.read(embedding)):
        raise ConfigError(f"{where}: {output} differs from {embedding} although the model ties them")
    ignored[output] = f"is {embedding} again"
    left.remove(output)


def _first(items: Sequence[str], count: int = 4) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
