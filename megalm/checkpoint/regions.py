"""Geometry of regions of global tensors, without torch: cut, subtracted and intersected."""

import math
from typing import NamedTuple

ELEMENT_BYTES = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), 1),
    "complex128": 16,
}
"""Of each dtype that a checkpoint may hold."""


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
