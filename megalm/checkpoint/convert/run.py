"""One conversion from folder to folder, and the check that ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.convert.formats import open_source
from megalm.checkpoint.convert.source import Source
from megalm.config.errors import ConfigError

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Options:
    """How the target is written. What does not concern its format must be left at its default."""

    to: str
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    torch_dist: bool = False
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    spelling: str = "te"
    pad_vocabulary: int = 128

    def check(self) -> None:
        """ConfigError for an option that would do nothing."""
        plain = Options(to=self.to)
        concerns = {
            "huggingface": {"dtype", "tokenizer", "max_shard_bytes"},
            "megalm": {"dtype"},
            "megatron": {"dtype", "torch_dist", "spelling", "pad_vocabulary"},
        }
        if self.to not in concerns:
            raise ConfigError(f"target format {self.to!r} is not known; allowed: {', '.join(concerns)}")
        allowed = set(concerns[self.to])
        if self.to == "megatron" and not self.torch_dist:
            allowed |= {"tensor", "pipeline", "virtual"}
        for name in self.__dataclass_fields__:
            if name != "to" and name not in allowed and getattr(self, name) != getattr(plain, name):
                where = "torch_dist, which has no layout" if self.torch_dist else self.to
                raise ConfigError(
                    f"{name.replace('_', '-')}={getattr(self, name)} has no meaning for {where}; leave it out"
                )
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
    identical: bool | None = None
    """Every weight, read back from the target, has the source's bits (None: not compared)."""

    def lines(self) -> list[str]:
        """The check for a person."""
        reasons: dict[str, int] = {}
        for reason in self.ignored.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        left_out = "".join(f"; {count} left out ({reason})" for reason, count in sorted(reasons.items()))
        result = [
            f"{self.source} ({self.source_format}): {self.source_tensors} tensors, {self.used} used{left_out}; none left over",
            f"{self.target} ({self.target_format}): {self.target_tensors} tensors written and found again, none missing",
            f"{self.global_tensors} weights, {self.parameters:,} parameters",
        ]
        if self.identical is not None:
            state = "every weight has the source's bits" if self.identical else "weights differ (another dtype)"
            result.append(f"read back: {state}")
        return result


def convert(source_path: Path, target: Path, options: Options, *, format: str | None = None, vocab_size: int | None = None,
            bits: bool = False, progress: Callable[[int], Progress] | None = None) -> tuple[Source, Report]:  # fmt: skip
    """Converts a folder. The target is opened again at the end, and must have each weight of the source in its shape.

    `bits`: also read every weight back and compare it. `progress` is told the number of bytes and gives back a function that
    is told of each tensor. Memory: about one tensor; for `mp_rank_*` targets one rank's share of the model.
    Errors: ConfigError, with nothing written where the source is at fault.
    """
    options.check()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; choose another target, or remove it")
    source = open_source(source_path, format, vocab_size=vocab_size)
    names = source.weights.names()
    sizes = {name: math.prod(source.weights.shape(name)) for name in names}
    itemsize = {name: (options.dtype or source.weights.dtype(name)).itemsize for name in names}
    tell = progress(sum(sizes[name] * itemsize[name] for name in names)) if progress else (lambda name, size: None)
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
        target_tensors=written,
        global_tensors=len(names),
    )
    again = reopen(target, source, options.to)
    _compare_outlines(source, again, options.dtype)
    if bits:
        report.identical = all(_same_bits(source.weights.read(name), again.weights.read(name)) for name in names)
        if not report.identical and options.dtype is None:
            raise ConfigError(f"{target}: what was read back is not what was written; check the disk")
    return source, report


def reopen(target: Path, source: Source, format: str) -> Source:
    """The target as a Source of the same vocabulary."""
    return open_source(target, format, vocab_size=source.model.vocab_size if format == "megatron" else None)


def _write(source: Source, target: Path, options: Options, progress: Progress) -> int:
    target.mkdir(parents=True, exist_ok=True)
    if options.to == "huggingface":
        from megalm.checkpoint.convert.huggingface import write_folder

        limit = options.max_shard_bytes
        return write_folder(
            source, target, dtype=options.dtype, tokenizer=options.tokenizer, max_shard_bytes=limit, progress=progress
        )
    if options.to == "megalm":
        from megalm.checkpoint.convert.native import write_native

        return write_native(source, target, dtype=options.dtype, progress=progress)
    how: dict[str, Any] = {
        "spelling": options.spelling,
        "pad_vocabulary": options.pad_vocabulary,
        "dtype": options.dtype,
    }
    if options.torch_dist:
        from megalm.checkpoint.convert.megatron_dist import write_dist

        return write_dist(source, target, **how, progress=progress)
    from megalm.checkpoint.convert.megatron_legacy import write_legacy

    layout: dict[str, Any] = {"tensor": options.tensor, "pipeline": options.pipeline, "virtual": options.virtual}
    return write_legacy(source, target, **layout, **how, progress=progress)


def _compare_outlines(source: Source, target: Source, dtype: torch.dtype | None) -> None:
    ours, theirs = set(source.weights.names()), set(target.weights.names())
    if ours != theirs:
        raise ConfigError(
            f"{target.path}: {min(ours ^ theirs)} is in only one of source and target; this is a bug, please report it"
        )
    for name in ours:
        expected = (source.weights.shape(name), dtype or source.weights.dtype(name))
        found = (target.weights.shape(name), target.weights.dtype(name))
        if found != expected:
            raise ConfigError(
                f"{target.path}: {name} was written as {found}, not {expected}; this is a bug, please report it"
            )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit, also where values are NaN or -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
