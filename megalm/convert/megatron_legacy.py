"""Megatron-LM's `mp_rank_*` checkpoints: one pickled file for each tensor- and pipeline-parallel rank, in both
directions."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert import megatron_names, restricted
from megalm.convert.megatron_args import read_args, write_args
from megalm.convert.megatron_names import EMBEDDING, OUTPUT, count_padded_rows, spell, spell_plainly
from megalm.convert.rules import Rule
from megalm.convert.source import RuleReader, Source, check_none_left, check_shapes, drop_tied_output

TRACKER = "latest_checkpointed_iteration.txt"
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")


def find_iteration_folder(path: Path) -> Path:
    """Find the folder of the iteration that the tracker file names, or `path` itself where it is one."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text().strip()
    if text != "release" and not text.isdigit():
        raise ConfigError(f"{tracker}: says {text[:40]!r}; it should be the number of an iteration, or 'release'")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ConfigError(
            f"{tracker}: names {folder.name}, which is not there; copy the whole checkpoint, or give the iteration's folder"
        )
    return folder


class RankFiles:
    """The tensors of all ranks' files under plain names, each joined over the tensor-parallel ranks.

    Files are mapped, not read: memory holds the tensor that is being joined.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        states = self._load_all()
        first = states[0][0]
        if not isinstance(first.get("args"), Namespace):
            raise ConfigError(
                f"{folder}: the rank files hold no training arguments ('args'); they are not Megatron-LM's"
            )
        self.args: Namespace = first["args"]
        self.version = float(first.get("checkpoint_version", 0))
        self.iteration = int(first.get("iteration", 0) or 0)
        self.tensor, self.pipeline = len(states[0]), len(states)
        self.parts: dict[str, list[Tensor]] = {}
        self.recomputed: list[str] = []
        self.tied_copy: list[Tensor] | None = None
        self._collect(states)
        self.dims: dict[str, int | None] = {}

    def _load_all(self) -> list[list[dict[str, Any]]]:
        """Load the contents of the rank files: [pipeline stage][tensor rank]."""
        found: dict[tuple[int, int], Path] = {}
        for entry in sorted(self.folder.iterdir()):
            match = _RANK_FOLDER.fullmatch(entry.name)
            if match is None:
                continue
            if match[3] is not None:
                raise ConfigError(f"{entry}: expert-parallel checkpoints are not supported")
            file = next((entry / name for name in _RANK_FILES if (entry / name).is_file()), None)
            if file is None:
                raise ConfigError(f"{entry}: holds no model_optim_rng.pt; copy the whole checkpoint")
            found[int(match[2] or 0), int(match[1])] = file
        stages, ranks = (1 + max((key[axis] for key in found), default=-1) for axis in (0, 1))
        missing = [(p, t) for p in range(stages) for t in range(ranks) if (p, t) not in found]
        if missing or not found:
            raise ConfigError(
                f"{self.folder}: the files of (pipeline stage, tensor rank) {missing or 'all ranks'} are missing"
            )
        states = [[restricted.load(found[p, t]) for t in range(ranks)] for p in range(stages)]
        for stage in states:
            for state in stage:
                if not isinstance(state, dict):
                    raise ConfigError(f"{self.folder}: a rank file does not hold a dictionary; it is not Megatron-LM's")
        return states

    def _collect(self, states: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Gives each stage's layers, which count from 0 on every stage and chunk, their numbers in the whole model."""
        chunk_keys = (
            ["model"]
            if "model" in states[0][0]
            else sorted(key for key in states[0][0] if re.fullmatch(r"model\d+", key))
        )
        if not chunk_keys:
            raise ConfigError(f"{self.folder}: the rank files hold no 'model'")
        before = 0
        for chunk, key in enumerate(chunk_keys):
            for stage, ranks in enumerate(states):
                flat = [_flatten(state[key]) for state in ranks]
                for other in flat[1:]:
                    if other.keys() != flat[0].keys():
                        name = min(other.keys() ^ flat[0].keys())
                        raise ConfigError(
                            f"{self.folder}: tensor ranks of stage {stage} disagree about whether {name} exists"
                        )
                count = 0
                for stored in flat[0]:
                    name, here = _shift_layer(spell_plainly(stored), before)
                    count = max(count, here)
                    tensors = [state[stored] for state in flat]
                    if megatron_names.RECOMPUTED.search(name):
                        self.recomputed.append(name)
                    elif name in self.parts:
                        raise ConfigError(
                            f"{self.folder}: {name} is stored twice (again as {stored} on stage {stage}, chunk {chunk})"
                        )
                    else:
                        self.parts[name] = tensors
                before += count

    def use(self, rules: Sequence[Rule]) -> None:
        """Says on which dimension each tensor is divided."""
        self.dims = {rule.foreign: rule.dim for rule in rules}

    def names(self) -> list[str]:
        return list(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        shape, dim = list(self.parts[name][0].shape), self.dims.get(name)
        if dim is not None:
            shape[dim] = sum(tensor.shape[dim] for tensor in self.parts[name])
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.parts[name][0].dtype

    def read(self, name: str) -> Tensor:
        tensors, dim = self.parts[name], self.dims.get(name)
        if dim is not None:
            return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
        for rank, tensor in enumerate(tensors[1:], start=1):
            if not torch.equal(tensor, tensors[0]):
                raise ConfigError(
                    f"{self.folder}: {name} differs between tensor ranks 0 and {rank}, but each should hold the same"
                )
        return tensors[0]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Turn nested dictionaries (before core) or a flat one (core) into one flat dictionary of tensors."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flatten(value, name + "."))
        elif isinstance(value, Tensor):
            flat[name] = value
        elif not megatron_names.RECOMPUTED.search(name) and value is not None:
            raise ConfigError(f"the model's entry {name} is a {type(value).__name__}, not a tensor")
    return flat


def _shift_layer(name: str, before: int) -> tuple[str, int]:
    """The name with its layer's number in the whole model, and how many layers it shows the chunk to have."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if match is None:
        return name, 0
    number = int(match[1])
    return f"decoder.layers.{before + number}.{name[match.end() :]}", number + 1


def _refuse_mixture(model: ModelConfig) -> None:
    if model.moe.num_experts:
        raise ConfigError(
            f"a mixture of {model.moe.num_experts} experts in Megatron's rank files (mp_rank_*) is not supported: use its "
            "torch_dist format (--torch-dist), to which Megatron-LM converts rank files by --ckpt-convert-format torch_dist"
        )


def open_legacy(folder: Path, vocab_size: int | None = None) -> Source:
    """Open an iteration's folder of `mp_rank_*` files as a Source."""
    files = RankFiles(folder)
    model = read_args(files.args, vocab_size)
    _refuse_mixture(model)
    table = megatron_names.make_megatron_rules(
        model, tensor=files.tensor, padded_vocab_size=files.args.padded_vocab_size, version=files.version
    )
    files.use([*table, Rule(OUTPUT, table[0].parts, pad_to=table[0].pad_to, dim=0)])
    check_shapes(folder, files, {rule.foreign: rule.shape for rule in table})
    ignored = dict.fromkeys(files.recomputed, "follows from the configuration")
    left = set(files.names()) - {rule.foreign for rule in table}
    if model.tie_embeddings:
        drop_tied_output(folder, files, left, ignored, output=OUTPUT, embedding=EMBEDDING)
    check_none_left(folder, sorted(left))
    return Source(
        path=folder,
        format="megatron",
        model=model,
        weights=RuleReader(files, table),
        foreign_count=len(files.names()) + len(files.recomputed),
        ignored=ignored,
        step=files.iteration,
    )


def write_legacy(
    source: Source,
    folder: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    spelling: str = "te",
    pad_vocabulary: int = 128,
    dtype: torch.dtype | None = None,
    progress: Any = lambda name, size: None,
) -> int:
    """Writes `mp_rank_*` files for tensor x pipeline ranks (`virtual` model chunks on each). Returns the number of
    tensors.

    The format has one pickle a rank, so memory holds one rank's share of the model at a time.
    """
    model = source.model
    _refuse_mixture(model)
    if model.num_layers % (pipeline * virtual):
        raise ConfigError(
            f"{model.num_layers} layers cannot be divided over {pipeline} stages x {virtual} chunks evenly"
        )
    padded = count_padded_rows(model.vocab_size, pad_vocabulary, tensor)
    args = write_args(model, tensor=tensor, pipeline=pipeline, virtual=virtual, padded_vocab_size=padded)
    table = megatron_names.make_megatron_rules(model, tensor=tensor, padded_vocab_size=padded)
    check_none_left(
        source.path, sorted(set(source.weights.names()) - {part.name for rule in table for part in rule.parts})
    )
    check_shapes(source.path, source.weights, {part.name: part.shape for rule in table for part in rule.parts})
    name = f"iter_{source.step:07d}" if source.step else "release"
    per_chunk = model.num_layers // (pipeline * virtual)
    written: set[str] = set()
    for stage in range(pipeline):
        for rank in range(tensor):
            state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": source.step}
            for chunk in range(virtual):
                first = (chunk * pipeline + stage) * per_chunk
                here = _chunk_rules(table, range(first, first + per_chunk), model.num_layers, model.tie_embeddings)
                tensors: dict[str, Tensor] = {}
                for rule in here:
                    whole = rule.join([source.weights.read(part.name) for part in rule.parts])
                    share = whole if rule.dim is None else whole.chunk(tensor, rule.dim)[rank]
                    local, _ = _shift_layer(rule.foreign, -first)
                    tensors[spell(local, spelling)] = share.to(dtype or share.dtype).clone()
                    progress(rule.foreign, share.nbytes)
                    written.add(rule.foreign)
                nested = _nest(tensors, model.tie_embeddings) if spelling.startswith("legacy") else tensors
                state["model" if virtual == 1 else f"model{chunk}"] = nested
            rank_name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            target = folder / name / rank_name / _RANK_FILES[0]
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, target.with_suffix(".part"))
            os.replace(target.with_suffix(".part"), target)
    (folder / TRACKER).write_text(f"{source.step}" if source.step else "release")
    return len(written)


def _chunk_rules(table: Sequence[Rule], layers: range, num_layers: int, tied: bool) -> list[Rule]:
    """Take the part of the table that a model chunk with these layers holds."""
    here = []
    for rule in table:
        match = re.match(r"decoder\.layers\.(\d+)\.", rule.foreign)
        if match:
            wanted = int(match[1]) in layers
        else:
            wanted = layers.start == 0 if rule.foreign.startswith("embedding.") else layers.stop == num_layers
        if wanted:
            here.append(rule)
    if tied and layers.stop == num_layers and layers.start > 0:
        embedding = next(rule for rule in table if rule.foreign == EMBEDDING)
        here.append(replace(embedding, foreign=OUTPUT))
    return here


def _nest(flat: dict[str, Tensor], tied: bool) -> dict[str, Any]:
    """The nested form of the time before core. A tied embedding's copy on the last stage has a place of its own
    there."""
    language_model: dict[str, Any] = {}
    model: dict[str, Any] = {"language_model": language_model}
    for name, tensor in flat.items():
        top, rest = name.split(".", 1)
        if top == "embedding":
            table, kind = rest.split(".", 1)
            language_model.setdefault("embedding", {}).setdefault(table, {})[kind] = tensor
        elif name == OUTPUT and tied:
            model["word_embeddings_for_head"] = {"weight": tensor}
        else:
            language_model.setdefault(top, {})[rest] = tensor
    return model
