"""Boxes of tensors as checkpoints know them: names, dtypes, and the values of a region."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from megalm.checkpoint.regions import Region
from megalm.parallel.slices import Box


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
