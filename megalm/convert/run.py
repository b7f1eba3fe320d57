"""One conversion from folder to folder, and the check that ends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm.config.errors import ConfigError
from megalm.convert.average import average
from megalm.convert.choices import FORMATS
from megalm.convert.formats import open_source
from megalm.convert.huggingface_settings import EVERYTHING
from megalm.convert.megatron_dist import OPTIMIZER_REASON
from megalm.convert.source import Source
from megalm.convert.upcycle import upcycle
from megalm.convert.weights import WeightReader

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Options:
    """How the target is written. What does not concern its format must be left at its default."""

    to: str
    dtype: torch.dtype | None = None
    optimizer: bool = False
    upcycle: int = 0
    """Experts that each MLP of a dense model is copied to; 0: none."""
    top_k: int = 2
    """Of these, for a token."""
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    torch_dist: bool = False
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    spelling: str = "te"
    pad_vocabulary: int = 128

    def check(self) -> None:
        """Refuse an option that would do nothing. Errors: ConfigError."""
        plain = Options(to=self.to)
        concerns = {
            "huggingface": {"dtype", "tokenizer", "max_shard_bytes"},
            "megalm": {"dtype", "optimizer", "upcycle"} | ({"top_k"} if self.upcycle else set()),
            "megatron": {"dtype", "torch_dist", "spelling", "pad_vocabulary"},
        }
        FORMATS.find(self.to)
        allowed = set(concerns.get(self.to, ()))
        if self.to == "megatron" and not self.torch_dist:
            allowed |= {"tensor", "pipeline", "virtual"}
        if self.torch_dist:
            allowed |= {"optimizer"}
        for name in self.__dataclass_fields__:
            if name != "to" and name not in allowed and getattr(self, name) != getattr(plain, name):
                where = "torch_dist, which has no layout" if self.torch_dist else self.to
                raise ConfigError(
                    f"{name.replace('_', '-')}={getattr(self, name)} has no meaning for {where}; leave it out"
                )
        if self.optimizer and self.upcycle:
            raise ConfigError("upcycle and optimizer: the moments are of another model; leave one out")
        if self.optimizer and self.to == "megalm" and self.dtype is not None:
            raise ConfigError(f"dtype={self.dtype} and optimizer: the state of an optimizer is fp32; leave one out")
        for name in ("tensor", "pipeline", "virtual", "pad_vocabulary", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')}={getattr(self, name)} must be at least 1")


@dataclass
class Report:
    """What a conversion did; every tensor of the source is in exactly one of `used` and `ignored`."""

    source: str
    source_format: str
    target: str
    target_format: str
    architecture: dict[str, Any]
    parameters: int
    source_tensors: int
    used: int
    ignored: dict[str, str] = field(default_factory=dict)
    target_tensors: int = 0
    global_tensors: int = 0
    optimizer_step: int | None = None
    """Updates that the optimizer had made, where its state was converted."""
    identical: bool | None = None
    """Every weight, read back from the target, has the source's bits (None: not compared)."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how the source was read."""

    def lines(self) -> list[str]:
        """Tell a person what was checked."""
        reasons: dict[str, int] = {}
        for reason in self.ignored.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        left_out = "".join(f"; {count} left out ({reason})" for reason, count in sorted(reasons.items()))
        result = [
            f"{self.source} ({self.source_format}): {self.source_tensors} tensors, {self.used} used{left_out}; none left over",
            f"{self.target} ({self.target_format}): {self.target_tensors} tensors written and found again, none missing",
            f"{self.global_tensors} weights, {self.parameters:,} parameters",
        ]
        if self.optimizer_step is not None:
            result.append(
                f"the optimizer's state after {self.optimizer_step} updates: fp32 weights and both moments of each"
            )
        if self.identical is not None:
            state = "every weight has the source's bits" if self.identical else "weights differ (another dtype)"
            result.append(f"read back: {state}")
        return result + [f"note: {note}" for note in self.notes]


def convert(
    source_path: Path,
    target: Path,
    options: Options,
    *,
    format: str | None = None,
    vocab_size: int | None = None,
    accept: Collection[str] = (),
    others: Sequence[Path] = (),
    bits: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> tuple[Source, Report]:
    """Converts a folder. The target is opened again at the end, and must have each weight of the source in its shape.

    `others`: folders whose weights are averaged with the source's. `accept`: settings of the source's config.json that are
    not known here. `bits`: also read every weight back and compare it.
    `progress` is told the number of bytes and gives back a function that is told of each tensor. Memory: about one tensor;
    for `mp_rank_*` targets one rank's share of the model.
    Errors: ConfigError, with nothing written where the source is at fault.
    """
    options.check()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; choose another target, or remove it")
    source = open_source(source_path, format, vocab_size=vocab_size, accept=accept)
    if others:
        if options.optimizer:
            raise ConfigError("average and optimizer: a mean has no moments; leave one out")
        opened = [open_source(path, format, vocab_size=vocab_size, accept=accept) for path in others]
        source = average([source, *opened])
    if options.upcycle:
        source = upcycle(source, options.upcycle, options.top_k)
    if options.optimizer and source.optimizer is None:
        raise ConfigError(
            f"{source.path}: holds no state of an optimizer that can be converted: megalm's own checkpoints do, and Megatron's "
            "torch_dist ones that were saved fully reshardable. Leave --optimizer out."
        )
    state = source.optimizer if options.optimizer else None
    if state is not None:
        source.ignored = {key: reason for key, reason in source.ignored.items() if reason != OPTIMIZER_REASON}
    names = source.weights.names()
    sizes = {name: math.prod(source.weights.shape(name)) for name in names}
    itemsize = {name: (options.dtype or source.weights.dtype(name)).itemsize for name in names}
    total = sum(sizes[name] * itemsize[name] for name in names)
    if state is not None:
        total = sum(sizes[name] * (12 if options.to == "megalm" else 12 + itemsize[name]) for name in names)
    tell = progress(total) if progress else (lambda name, size: None)
    written = _write(source, target, options, tell)
    report = Report(
        source=str(source.path),
        source_format=source.format,
        target=str(target),
        target_format=options.to,
        architecture={"num_layers": source.model.num_layers, "hidden_size": source.model.hidden_size},
        parameters=sum(sizes.values()),
        source_tensors=source.foreign_count,
        used=source.foreign_count - len(source.ignored),
        ignored=source.ignored,
        notes=source.notes,
        target_tensors=written,
        global_tensors=len(names),
    )
    again = reopen(target, source, options.to)
    weights = source.weights if state is None or options.to != "megalm" else state.weights
    _compare_outlines(weights, again.weights, again.path, options.dtype)
    pairs = [(weights, again.weights)]
    if state is not None:
        if again.optimizer is None or (again.optimizer.step, again.optimizer.tokens) != (state.step, state.tokens):
            raise ConfigError(f"{target}: the optimizer's state was not found again; this is a bug, please report it")
        report.optimizer_step = state.step
        for ours, theirs in zip(state.parts().values(), again.optimizer.parts().values(), strict=True):
            _compare_outlines(ours, theirs, again.path, None)
            pairs.append((ours, theirs))
    if bits:
        report.identical = all(
            _same_bits(ours.read(name), theirs.read(name)) for ours, theirs in pairs for name in names
        )
        if not report.identical and options.dtype is None:
            raise ConfigError(f"{target}: what was read back is not what was written; check the disk")
    return source, report


def reopen(target: Path, source: Source, format: str) -> Source:
    """Open the target again as a Source of the same vocabulary."""
    vocab_size = source.model.vocab_size if format == "megatron" else None
    return open_source(target, format, vocab_size=vocab_size, accept=EVERYTHING)


def _write(source: Source, target: Path, options: Options, progress: Progress) -> int:
    target.mkdir(parents=True, exist_ok=True)
    own = FORMATS[options.to]
    if own is not None:
        return own.write(source, target)
    if options.to == "huggingface":
        from megalm.convert.huggingface import write_folder

        limit = options.max_shard_bytes
        return write_folder(
            source, target, dtype=options.dtype, tokenizer=options.tokenizer, max_shard_bytes=limit, progress=progress
        )
    if options.to == "megalm":
        from megalm.convert.native import write_native

        state = source.optimizer if options.optimizer else None
        return write_native(source, target, dtype=options.dtype, optimizer=state, progress=progress)
    how: dict[str, Any] = {
        "spelling": options.spelling,
        "pad_vocabulary": options.pad_vocabulary,
        "dtype": options.dtype,
    }
    if options.torch_dist:
        from megalm.convert.megatron_dist import write_dist

        state = source.optimizer if options.optimizer else None
        return write_dist(source, target, **how, optimizer=state, progress=progress)
    from megalm.convert.megatron_legacy import write_legacy

    layout: dict[str, Any] = {"tensor": options.tensor, "pipeline": options.pipeline, "virtual": options.virtual}
    return write_legacy(source, target, **layout, **how, progress=progress)


def _compare_outlines(source: WeightReader, target: WeightReader, path: Path | str, dtype: torch.dtype | None) -> None:
    ours, theirs = set(source.names()), set(target.names())
    if ours != theirs:
        raise ConfigError(
            f"{path}: {min(ours ^ theirs)} is in only one of source and target; this is a bug, please report it"
        )
    for name in ours:
        expected = (source.shape(name), dtype or source.dtype(name))
        found = (target.shape(name), target.dtype(name))
        if found != expected:
            raise ConfigError(f"{path}: {name} was written as {found}, not {expected}; this is a bug, please report it")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True where both are equal in every bit, also where values are NaN or -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
