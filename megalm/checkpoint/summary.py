"""What a checkpoint holds, and how two of them differ."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from megalm.checkpoint.load import OPTIMIZER_PREFIX
from megalm.checkpoint.reader import CheckpointReader

# Elements worked on at a time, so that a norm in double precision needs little memory beside the tensor itself.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class TensorSummary:
    """One global tensor in figures."""

    name: str
    dtype: str
    shape: list[int]
    norm: float
    """Euclidean norm, in double precision."""
    largest: float
    """Largest magnitude."""
    nonfinite: int
    """Elements that are NaN or infinite."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    note: str
    """What else than values differs: it is in one of them only, or of another shape or type. Empty otherwise."""
    largest: float
    """Largest difference of two elements."""
    relative: float
    """Norm of the difference, over the norm of the first."""
    differing: int
    """Elements that differ in any bit."""


def make_overview(reader: CheckpointReader) -> dict[str, Any]:
    """Make the checkpoint as a whole, from its manifest and state; reads no tensor."""
    manifest, state = reader.manifest, reader.state()
    weights = [t for n, t in manifest.tensors.items() if not n.startswith(OPTIMIZER_PREFIX)]
    optimizer = [t for n, t in manifest.tensors.items() if n.startswith(OPTIMIZER_PREFIX)]
    return {
        "path": str(reader.path),
        "step": manifest.step,
        "tokens": state.get("tokens"),
        "saved_at": manifest.saved_at,
        "versions": manifest.versions,
        "world_size": manifest.world_size,
        "layout": manifest.layout,
        "parameters": sum(math.prod(t.shape) for t in weights),
        "dtypes": sorted({t.dtype for t in weights}),
        "weight_bytes": sum(math.prod(t.shape) * t.itemsize for t in weights),
        "optimizer_bytes": sum(math.prod(t.shape) * t.itemsize for t in optimizer),
        "file_bytes": manifest.bytes,
        "files": {name: record.bytes for name, record in sorted(manifest.files.items())},
    }


def summarize(reader: CheckpointReader, *, optimizer: bool = False) -> list[TensorSummary]:
    """Summarize each tensor's norm, largest magnitude and count of non-finite elements; one tensor is in memory at a time."""
    rows = []
    for name, tensor in reader.tensors(optimizer=optimizer):
        squares, largest, nonfinite = 0.0, 0.0, 0
        for block in tensor.reshape(-1).split(_BLOCK):
            values = block.double()
            finite = values.isfinite()
            nonfinite += int((~finite).sum())
            values = torch.where(finite, values, 0.0)
            squares += float(values.square().sum())
            largest = max(largest, float(values.abs().max()) if len(values) else 0.0)
        rows.append(
            TensorSummary(
                name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), squares**0.5, largest, nonfinite
            )
        )
    return rows


def list_differences(
    first: CheckpointReader, second: CheckpointReader, *, optimizer: bool = False
) -> list[TensorDifference]:
    """List the tensors that differ, in the order of the first checkpoint; empty when all are the same, bit by bit."""
    names = first.names(optimizer=optimizer)
    others = second.names(optimizer=optimizer)
    rows = []
    for name in [*names, *(n for n in others if n not in names)]:
        a, b = first.manifest.tensors.get(name), second.manifest.tensors.get(name)
        if a is None or b is None:
            rows.append(TensorDifference(name, f"only in the {'second' if a is None else 'first'}", 0.0, 0.0, 0))
        elif a.shape != b.shape:
            rows.append(TensorDifference(name, f"shape {list(a.shape)} and {list(b.shape)}", 0.0, 0.0, 0))
        else:
            note = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}"
            row = _difference(name, note, first.tensor(name), second.tensor(name))
            if row.differing or note:
                rows.append(row)
    return rows


def list_state_differences(first: Any, second: Any, where: str = "") -> list[str]:
    """List the entries of two states that differ, one `path: first, second` a line."""
    if isinstance(first, dict) and isinstance(second, dict):
        lines = []
        for key in sorted({*first, *second}):
            path = f"{where}.{key}" if where else key
            if key not in first or key not in second:
                lines.append(f"{path}: only in the {'second' if key not in first else 'first'}")
            else:
                lines += list_state_differences(first[key], second[key], path)
        return lines
    return [] if first == second else [f"{where}: {_short(first)}, {_short(second)}"]


def _difference(name: str, note: str, a: torch.Tensor, b: torch.Tensor) -> TensorDifference:
    largest, squares, norm, differing = 0.0, 0.0, 0.0, 0
    for x, y in zip(a.reshape(-1).split(_BLOCK), b.reshape(-1).split(_BLOCK), strict=True):
        if x.dtype == y.dtype:
            differing += int((x.view(torch.uint8) != y.view(torch.uint8)).view(len(x), -1).any(1).sum())
        else:
            differing += int((x.double() != y.double()).sum())
        delta = (x.double() - y.double()).abs()
        delta[delta.isnan()] = 0.0  # counted above where the bits differ
        largest = max(largest, float(delta.max()) if len(delta) else 0.0)
        squares += float(delta.square().sum())
        norm += float(x.double().square().sum())
    relative = (squares / norm) ** 0.5 if norm else float(squares > 0)
    return TensorDifference(name, note, largest, relative, differing)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
