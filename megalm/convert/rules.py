"""Rules: how the tensors of a foreign checkpoint are made of megalm's global tensors.

A conversion is a table of rules, read in either direction. A rule says that one foreign tensor is a stack of global
tensors (along dim 0), its rows put into another order, then transposed or not, then padded with rows or not. Each of
these steps can be undone without changing a bit, so importing is the same table read backwards.

    foreign = pad(transpose(stack(parts)[rows]))        parts = split(inverse_rows(transpose(unpad(foreign))))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A global tensor that takes part in a foreign tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One foreign tensor and the global tensors it is made of.

    `rows` returns, for each row of the foreign tensor, its row in the stack of the parts. `pad_to` is the number of
    rows after padding (a padded vocabulary). `dim` is the dimension of the foreign tensor on which Megatron's
    tensor-parallel ranks divide it. `view` gives the stack other
    dims, `swap` then turns the last two round, and `flat` makes the first two one again.
    """

    foreign: str
    parts: tuple[Part, ...]
    rows: Callable[[], Tensor] | None = None
    transpose: bool = False
    pad_to: int | None = None
    dim: int | None = None
    aliases: tuple[str, ...] = field(default=())
    view: tuple[int, ...] | None = None
    swap: bool = False
    flat: bool = False

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """The foreign tensor's shape."""
        shape = self.stacked_shape
        if self.transpose:
            shape = shape[::-1]
        if self.pad_to is not None:
            shape = (self.pad_to, *shape[1:])
        if self.view is None:
            return shape
        shape = (*self.view[:-2], self.view[-1], self.view[-2]) if self.swap else self.view
        return (shape[0] * shape[1], *shape[2:]) if self.flat else shape

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join global tensors (in the order of `parts`) into the foreign tensor."""
        for part, tensor in zip(self.parts, tensors, strict=True):
            if tuple(tensor.shape) != part.shape:
                raise ValueError(f"{part.name} has shape {tuple(tensor.shape)}, {part.shape} was expected")
        result = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.rows is not None:
            result = result[self.rows()]
        if self.transpose:
            result = result.T
        if self.pad_to is not None and self.pad_to > result.shape[0]:
            result = torch.cat([result, result.new_zeros(self.pad_to - result.shape[0], *result.shape[1:])])
        if self.view is not None:
            result = result.reshape(self.view)
            result = result.transpose(-1, -2) if self.swap else result
            result = result.flatten(0, 1) if self.flat else result
        return result.contiguous()

    def split(self, foreign: Tensor) -> list[Tensor]:
        """Split the foreign tensor into global tensors (in the order of `parts`). Padding rows are dropped."""
        if tuple(foreign.shape) != self.shape:
            raise ValueError(f"{self.foreign} has shape {tuple(foreign.shape)}, {self.shape} was expected")
        if self.view is not None:
            if self.swap:
                foreign = foreign.reshape(*self.view[:-2], self.view[-1], self.view[-2]).transpose(-1, -2)
            foreign = foreign.reshape(self.stacked_shape)
        if self.pad_to is not None:
            foreign = foreign[: self.stacked_shape[0]]
        if self.transpose:
            foreign = foreign.T
        if self.rows is not None:
            foreign = foreign[torch.argsort(self.rows())]
        return [piece.contiguous() for piece in foreign.split([part.shape[0] for part in self.parts])]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def order_grouped_rows(num_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """Row order of a fused projection that keeps, for each key/value group, [its query heads, key, value] together.

    The stack is [query; key; value] with [num_heads, num_kv_heads, num_kv_heads] heads. Megatron and GPT-NeoX store it
    like this.
    """
    heads = torch.arange((num_heads + 2 * num_kv_heads) * head_dim).view(-1, head_dim)
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads])
    groups = torch.cat([query.view(num_kv_heads, -1, head_dim), key.unsqueeze(1), value.unsqueeze(1)], dim=1)
    return groups.reshape(-1)


def order_gated_rows(features: int, ranks: int) -> Tensor:
    """Row order of [gate; up], `features` rows each, where each tensor-parallel rank holds its own [gate; up]."""
    return torch.arange(2 * features).view(2, ranks, features // ranks).transpose(0, 1).reshape(-1)


def order_half_split_rows(num_heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Row order that turns rotary pairs (0, 1), (2, 3).. into (0, r/2), (1, r/2+1).. within each head."""
    rotary = torch.cat([torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2)])
    head = torch.cat([rotary, torch.arange(rotary_dim, head_dim)])
    return (torch.arange(num_heads).unsqueeze(1) * head_dim + head).reshape(-1)
