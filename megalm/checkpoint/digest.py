"""A digest of tensors' values that no layout changes: it tells whether weights are those that something was computed with."""

from collections.abc import Sequence
from zlib import crc32

import torch

from megalm.checkpoint.planner import BoxSavePlanner, find_item_region
from megalm.checkpoint.ranks import Ranks
from megalm.parallel.slices import Box

_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""Odd multipliers of splitmix64, as signed numbers."""


def digest_tensors(boxes: Sequence[Box], ranks: Ranks) -> str:
    """Digest the values, names and shapes of fp32 tensors that these boxes, of all ranks together, cover.

    Each element is mixed with its place in its global tensor, and all are added up modulo 2^64: in any order, over any cut.
    Comm: the boxes' places and one number from each rank
    """
    planner = BoxSavePlanner(boxes)
    plans, _ = planner.create_global_plan(ranks.all_gather(planner.create_local_plan()))
    total = 0
    for item in plans[ranks.rank].items:
        assert item.tensor_data is not None
        region = find_item_region(item)
        total += _mix(planner.resolve_data(item), item.index.fqn, tuple(item.tensor_data.size), region.offset)
    return f"{sum(ranks.all_gather(total)) % 2**64:016x}"


def _mix(values: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> int:
    place = torch.zeros((), dtype=torch.int64, device=values.device)
    for dim, (size, first, length) in enumerate(zip(shape, offset, values.shape, strict=True)):
        inside = torch.arange(first, first + length, device=values.device)
        place = place[..., None] * size + inside if dim else inside
    place = place + crc32(f"{name} {shape}".encode()) * 2**31
    mixed = values.float().contiguous().view(torch.int32).long() + place * _ODD[0]
    for odd in _ODD[1:]:
        mixed = (mixed ^ (mixed >> 29)) * odd
    return int((mixed ^ (mixed >> 32)).sum())
