"""Filling boxes from a checkpoint that any layout wrote."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from megalm.checkpoint.boxes import look_up_dtype
from megalm.checkpoint.errors import CorruptCheckpointError
from megalm.checkpoint.manifest import (
    RANKS,
    STATE,
    ChunkRecord,
    Manifest,
    TensorRecord,
    compute_checksum,
    sort_naturally,
)
from megalm.checkpoint.planner import BoxLoadPlanner
from megalm.checkpoint.source import CheckpointSource, read_checked
from megalm.config.errors import ConfigError
from megalm.parallel.slices import Box

OPTIMIZER_PREFIX = "optimizer."
# How many differing tensors a message names: enough to see the pattern, few enough to read.
_NAMED = 5


def fill_boxes(boxes: Sequence[Box], source: CheckpointSource, manifest: Manifest) -> None:
    """Overwrite the boxes' tensors with what the checkpoint holds for them; every piece read is checked first.

    A tensor of another floating type than the stored one is converted. The boxes must be in the checkpoint
    (`check_same_model`). Errors: CorruptCheckpointError; then some boxes are filled and some are not.
    """
    planner = BoxLoadPlanner(boxes)
    planner.set_up_planner({}, make_torch_metadata(manifest))
    wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = {}
    for item in planner.create_local_plan().items:
        wanted.setdefault((item.storage_index.fqn, tuple(item.storage_index.offset or ())), []).append(item)
    places = {
        (name, chunk.region.offset): (tensor, chunk)
        for name, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
    }
    order = sorted(wanted, key=lambda key: (places[key][1].file, places[key][1].position))
    for key in order:
        tensor, chunk = places[key]
        values = read_chunk(source, key[0], tensor, chunk)
        for item in wanted[key]:
            part = values
            for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, size)
            planner.resolve_tensor(item).copy_(part)


def read_chunk(source: CheckpointSource, name: str, tensor: TensorRecord, chunk: ChunkRecord) -> torch.Tensor:
    """One stored piece, compared with its checksum."""
    data = source.read(chunk.file, chunk.position, chunk.region.numel * tensor.itemsize)
    if compute_checksum(data) != chunk.xxh3:
        raise CorruptCheckpointError(
            f"{source.name}: {name} at {list(chunk.region.offset)} in {chunk.file} is not what was saved "
            "(its checksum differs)"
        )
    raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8))
    return raw.view(look_up_dtype(tensor.dtype)).view(chunk.region.shape)


def read_state(source: CheckpointSource, manifest: Manifest) -> dict[str, Any]:
    """Read the run's state."""
    return _json(source, manifest, STATE)


def read_ranks(source: CheckpointSource, manifest: Manifest) -> dict[str, Any]:
    """{"world_size": ..., "layout": ..., "ranks": [one entry a rank]}"""
    return _json(source, manifest, RANKS)


def check_same_model(wanted: dict[str, tuple[int, ...]], manifest: Manifest, where: str) -> None:
    """ConfigError unless the model's tensors (of all ranks together) are the checkpoint's, name by name.

    Optimizer tensors are compared only where `wanted` has some: weights-only loading leaves them out.
    """
    with_optimizer = any(name.startswith(OPTIMIZER_PREFIX) for name in wanted)
    stored = {
        name: tensor.shape
        for name, tensor in manifest.tensors.items()
        if with_optimizer or not name.startswith(OPTIMIZER_PREFIX)
    }
    difference = describe_differing_shapes(stored, wanted)
    if difference is None:
        return
    if all(stored.get(n) == wanted.get(n) for n in {*stored, *wanted} if not n.startswith(OPTIMIZER_PREFIX)):
        advice = "The weights agree, the optimizer does not: use the one it was saved with, or checkpoint.load=weights."
    else:
        advice = "Give the model configuration that it was trained with, or another checkpoint.path."
    raise ConfigError(f"{where} is a checkpoint of another model ({difference}\n{advice}")


def describe_differing_shapes(stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str | None:
    """Describe how many tensors differ, and the first of them a line each; None where all are the same."""
    differing = [
        f"\n  {name}: {_shape(stored.get(name))} in the checkpoint, {_shape(wanted.get(name))} in the model"
        for name in sorted(
            {*wanted, *stored}, key=lambda name: (name.startswith(OPTIMIZER_PREFIX), sort_naturally(name))
        )
        if stored.get(name) != wanted.get(name)
    ]
    if not differing:
        return None
    more = f"\n  ... and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return f"{len(differing)} tensors differ):" + "".join(differing[:_NAMED]) + more


def list_shapes(boxes: Iterable[Box]) -> dict[str, tuple[int, ...]]:
    """Global name -> global shape of the boxes' tensors (those without elements are not stored, so not compared)."""
    return {box.name: tuple(box.global_shape) for box in boxes if math.prod(box.global_shape)}


def make_torch_metadata(manifest: Manifest) -> Metadata:
    """Make the manifest as torch's `Metadata`, without reading the pickled one."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=look_up_dtype(tensor.dtype)),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(c.region.offset), torch.Size(c.region.shape)) for c in tensor.chunks],
            )
            for name, tensor in manifest.tensors.items()
        }
    )


def _json(source: CheckpointSource, manifest: Manifest, file: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(read_checked(source, manifest, file)))
    except ValueError as error:
        raise CorruptCheckpointError(f"{source.name}: {file}: {error}") from None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{source.name}: {file} holds no object")
    return value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
