"""Boxes as plans of `torch.distributed.checkpoint`: who writes what, and what is read into what.

Both planners follow torch's interfaces, so `dcp.save(..., planner=BoxSavePlanner(boxes))` and
`dcp.load(..., planner=BoxLoadPlanner(boxes))` work with torch's own storage; megalm's `Checkpointer` drives the same
two classes with its own storage and its own few messages between ranks.
"""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megalm.checkpoint.boxes import find_region, view
from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.regions import Region, cut, intersect, subtract
from megalm.parallel.slices import Box

# Larger boxes are cut to this size: one piece is what a checksum covers and what a reader holds in memory at a time.
CHUNK_BYTES = 64 << 20


def write_item(name: str, global_shape: Sequence[int], dtype: torch.dtype, region: Region) -> WriteItem:
    """torch's description of one piece to write."""
    chunk = ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(global_shape))
    return WriteItem(MetadataIndex(name, region.offset), WriteItemType.SHARD, tensor_data=data)


def find_item_region(item: WriteItem) -> Region:
    assert item.tensor_data is not None
    return Region(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def count_item_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return find_item_region(item).numel * item.tensor_data.properties.dtype.itemsize


class BoxSavePlanner(SavePlanner):
    """Each element of each global tensor is written exactly once, by one of the ranks that hold it.

    Replicas (data parallel copies, key/value heads on several tensor ranks, tied embeddings on both ends of a
    pipeline) are dealt out so that ranks write about the same number of bytes. A tensor that the boxes do not cover
    wholly is an error here, at the save, not at some later load.
    """

    def __init__(self, boxes: Sequence[Box], *, chunk_bytes: int | None = None) -> None:
        self.boxes = [box for box in boxes if box.tensor.numel()]
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES
        self.by_name: dict[str, list[Box]] = defaultdict(list)
        for box in self.boxes:
            self.by_name[box.name].append(box)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do: the boxes are given to the constructor (torch's state dict is not used)."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for box in self.boxes:
            limit = max(1, self.chunk_bytes // box.tensor.dtype.itemsize)
            for region in cut(find_region(box), limit):
                items.append(write_item(box.name, box.global_shape, box.tensor.dtype, region))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        holders: dict[str, dict[Region, list[int]]] = defaultdict(dict)
        kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                assert item.tensor_data is not None
                kind = (item.tensor_data.size, item.tensor_data.properties.dtype)
                if kinds.setdefault(item.index.fqn, kind) != kind:
                    raise CheckpointError(
                        f"{item.index.fqn}: rank {rank} holds it as {kind}, another rank as {kinds[item.index.fqn]}"
                    )
                holders[item.index.fqn].setdefault(find_item_region(item), []).append(rank)

        pieces: list[tuple[int, str, Region, list[int]]] = []
        for name, regions in holders.items():
            shape, dtype = kinds[name]
            for region, ranks in _disjoint(name, shape.numel(), regions):
                pieces.append((region.numel * dtype.itemsize, name, region, ranks))
        # Largest first onto the least loaded holder: within one chunk of an even deal.
        pieces.sort(key=lambda piece: (-piece[0], piece[1], piece[2]))
        load = [0] * len(all_plans)
        chosen: list[list[WriteItem]] = [[] for _ in all_plans]
        for size, name, region, ranks in pieces:
            rank = min(ranks, key=lambda candidate: load[candidate])
            load[rank] += size
            chosen[rank].append(write_item(name, *kinds[name], region))
        for items in chosen:
            items.sort(key=lambda item: (item.index.fqn, find_item_region(item)))
        plans = [replace(plan, items=items) for plan, items in zip(all_plans, chosen, strict=True)]
        return plans, describe_checkpoint(item for items in chosen for item in items)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        region = find_item_region(write_item)
        for box in self.by_name[write_item.index.fqn]:
            if intersect(find_region(box), region) == region:
                return view(box, region).detach()
        raise CheckpointError(f"{write_item.index.fqn}: this rank was asked for {region}, which it does not hold")


class BoxLoadPlanner(LoadPlanner):
    """Reads of every stored chunk that overlaps a box, straight into the box's tensor, whatever layout wrote it."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = [box for box in boxes if box.tensor.numel()]

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for number, box in enumerate(self.boxes):
            stored = self.metadata.state_dict_metadata[box.name]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = ChunkStorageMetadata(torch.Size(box.offset), box.tensor.shape)
            found = create_read_items_for_chunk_list(box.name, stored, [wanted])
            # The position in our list says which box it is: two boxes of one tensor may begin at the same offset.
            items += [replace(item, dest_index=MetadataIndex(box.name, box.offset, number)) for item in found]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor; boxes are filled from tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.index is not None
        tensor = self.boxes[read_item.dest_index.index].tensor.detach()
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave a view of the box itself."""


def describe_checkpoint(items: Any) -> Metadata:
    """torch's description of a whole checkpoint from all of its write items."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for item in items:
        data = item.tensor_data
        if item.index.fqn not in tensors:
            tensors[item.index.fqn] = TensorStorageMetadata(data.properties, data.size, [])
        tensors[item.index.fqn].chunks.append(data.chunk)
    return Metadata(dict(tensors))


def _disjoint(name: str, numel: int, regions: dict[Region, list[int]]) -> list[tuple[Region, list[int]]]:
    """The regions without overlap, each with the ranks that hold it; CheckpointError where something is missing."""
    pieces = list(regions.items())
    if sum(region.numel for region in regions) > numel:
        # Different ranks cut the same tensor at different places. Large pieces first: fewer cuts remain.
        pieces = []
        for region, ranks in sorted(regions.items(), key=lambda entry: (-entry[0].numel, entry[0])):
            rest = [region]
            for kept, _ in pieces:
                rest = [part for piece in rest for part in subtract(piece, kept)]
            pieces += [(part, ranks) for part in rest]
    covered = sum(region.numel for region, _ in pieces)
    if covered != numel:
        raise CheckpointError(f"{name}: the ranks together hold {covered} of its {numel} elements; nothing was saved")
    return pieces
