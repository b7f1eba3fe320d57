"""Geometry of boxes: which part of a global tensor, cut, subtracted and intersected."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megalm.parallel.slices import Box


class Region(NamedTuple):
    """The half-open box [offset, offset + shape) of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True)
class BoxIndex:
    """A box without its values: what ranks tell each other when they plan."""

    name: str
    global_shape: tuple[int, ...]
    dtype: str
    region: Region


def find_region(box: Box) -> Region:
    return Region(tuple(box.offset), tuple(box.tensor.shape))


def index_of(box: Box) -> BoxIndex:
    return BoxIndex(box.name, tuple(box.global_shape), name_dtype(box.tensor.dtype), find_region(box))


def bytes_of(box: Box) -> int:
    """Of the whole tensor that the box is a part of."""
    return math.prod(box.global_shape) * box.tensor.element_size()


def intersect(a: Region, b: Region) -> Region | None:
    """The part that both hold; None where they do not meet (boxes without elements meet nothing)."""
    start = tuple(max(p, q) for p, q in zip(a.offset, b.offset, strict=True))
    shape = tuple(min(p, q) - s for p, q, s in zip(a.end, b.end, start, strict=True))
    return Region(start, shape) if all(size > 0 for size in shape) else None


def subtract(a: Region, b: Region) -> list[Region]:
    """The elements of `a` that are not in `b`, as disjoint boxes (at most two a dimension)."""
    common = intersect(a, b)
    if common is None:
        return [a] if a.numel else []
    rest: list[Region] = []
    offset, shape = list(a.offset), list(a.shape)
    for dim in range(len(shape)):
        before = common.offset[dim] - offset[dim]
        after = offset[dim] + shape[dim] - common.end[dim]
        if before:
            rest.append(Region(tuple(offset), (*shape[:dim], before, *shape[dim + 1 :])))
        if after:
            rest.append(
                Region((*offset[:dim], common.end[dim], *offset[dim + 1 :]), (*shape[:dim], after, *shape[dim + 1 :]))
            )
        offset[dim], shape[dim] = common.offset[dim], common.shape[dim]
    return rest


def cut(region: Region, limit: int) -> list[Region]:
    """`region` in contiguous pieces of at most `limit` elements each, cut along the first dimension that can be cut."""
    if region.numel <= limit:
        return [region]
    dim = next(d for d, size in enumerate(region.shape) if size > 1)
    rows = max(1, limit // (region.numel // region.shape[dim]))
    pieces: list[Region] = []
    for start in range(0, region.shape[dim], rows):
        size = min(rows, region.shape[dim] - start)
        offset = (*region.offset[:dim], region.offset[dim] + start, *region.offset[dim + 1 :])
        pieces += cut(Region(offset, (*region.shape[:dim], size, *region.shape[dim + 1 :])), limit)
    return pieces


def view(box: Box, region: Region) -> torch.Tensor:
    """The part of the box's tensor that is `region` of the global tensor (a view; errors if it reaches outside)."""
    tensor = box.tensor
    if region == find_region(box):
        return tensor
    for dim, (start, size) in enumerate(zip(region.offset, region.shape, strict=True)):
        tensor = tensor.narrow(dim, start - box.offset[dim], size)
    return tensor


def name_dtype(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")


def look_up_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; ValueError for anything else that torch has under that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no torch dtype")
    return dtype


def describe_memory(box: Box) -> tuple[Any, ...]:
    """What a save needs to know of a box, and where its values lie: equal to the last save's, nothing is planned again."""
    tensor = box.tensor
    return box.name, box.global_shape, box.offset, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
