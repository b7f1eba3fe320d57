"""Which part of which global tensor a local parameter holds, and what it is for: the one truth for initialisation,
checkpoints, conversion, norms and update rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import TypeVar

import torch
from torch import nn

from megalm.parallel.mesh import Axis

TensorLike = TypeVar("TensorLike", bound=torch.Tensor)


class Role(Enum):
    """What a parameter is in the network, said by the layer that makes it: two tensors of one shape may need other update
    rules, rates and decay."""

    MATRIX = "matrix"
    """A map from one hidden space to another: projections of attention and of the dense MLP."""
    EXPERT_MATRIX = "expert_matrix"
    """The same, of one expert."""
    ROUTER = "router"
    """From the hidden state to a score for each expert."""
    OUTPUT = "output"
    """From the hidden state to the logits, where it is not the embedding's own table."""
    EMBEDDING = "embedding"
    """A table that is looked up by token or by position."""
    NORM = "norm"
    """The scale, and where there is one the shift, of a norm."""
    BIAS = "bias"
    """What a matrix's product is shifted by."""
    STATE = "state"
    """No parameter: kept with the weights and changed by a rule of its own, such as a router's selection bias."""


@dataclass(frozen=True)
class Piece:
    """A box of one global tensor, at consecutive rows (dim 0) of a local parameter.

    The box [offset, offset + shape) of the tensor `name` sits at local rows [row, row + shape[0]), whole in the other
    dims.
    `replicas` ranks of the tensor axis hold the same box; `owner` is true on exactly one of them (and on one end of
    the pipeline if tied).
    The local gradient is a partial sum: it must be all-reduced over each axis of `sum_over` before use.
    unit: rows of the tensor that belong to one head; 0: none do.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    row: int = 0
    replicas: int = 1
    owner: bool = True
    sum_over: tuple[Axis, ...] = ()
    unit: int = 0


@dataclass(frozen=True)
class Slice:
    """What a local parameter is made of. Rows that no piece covers are padding: always zero, never saved.

    role: what it is for. reduce_over: the mesh axis over which its gradients are summed ("data_context", or
    "expert_data").
    initial: standard deviation of the initial values (0.0: zeros), or "ones".
    shared: one backward pass may bring its gradient in several parts (an embedding that is also the output matrix).
    """

    pieces: tuple[Piece, ...]
    role: Role
    initial: float | str = 0.0
    reduce_over: str = "data_context"
    shared: bool = False


@dataclass(frozen=True)
class Box:
    """A local contiguous view of the box [offset, offset + tensor.shape) of a global tensor."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


def attach(parameter: TensorLike, slice_: Slice) -> TensorLike:
    """Make `slice_` the parameter's description; returns the parameter."""
    parameter.megalm_slice = slice_  # type: ignore[attr-defined]
    return parameter


def slice_of(parameter: torch.Tensor) -> Slice:
    """The description that `attach` gave."""
    found = getattr(parameter, "megalm_slice", None)
    if found is None:
        raise LookupError(f"a parameter of shape {tuple(parameter.shape)} has no slice: make it with slices.attach")
    return found


def tie(parameter: nn.Parameter, axis: Axis) -> nn.Parameter:
    """Declare that every rank of `axis` holds a copy of this parameter (tied embeddings: mesh.pipeline_ends).

    Call it on each of those ranks: gradients are then summed over the axis, and the first rank's copy is the owner.
    """
    if axis.size == 1:
        return parameter
    old = slice_of(parameter)
    pieces = tuple(
        replace(piece, owner=piece.owner and axis.rank == 0, sum_over=(*piece.sum_over, axis)) for piece in old.pieces
    )
    return attach(parameter, replace(old, pieces=pieces))


def make_replicated(
    name: str, shape: Sequence[int], axis: Axis, *, partial_gradient: bool, role: Role, initial: float | str
) -> Slice:
    """Make a whole tensor on every rank of `axis`; partial_gradient: each rank sees only a part of its gradient."""
    whole = tuple(shape)
    piece = Piece(
        name,
        whole,
        (0,) * len(whole),
        whole,
        replicas=axis.size,
        owner=axis.rank == 0,
        sum_over=(axis,) if partial_gradient and axis.size > 1 else (),
    )
    return Slice((piece,), role, initial)


def view_piece(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of a parameter (or of a tensor shaped like it) that hold `piece`."""
    return tensor.narrow(0, piece.row, piece.shape[0])


def list_boxes(module: nn.Module) -> list[Box]:
    """List the module's own parameters (not fp32 masters) and states as boxes of global tensors; a shared parameter once."""
    parameters = [
        Box(piece.name, piece.global_shape, piece.offset, view_piece(parameter.detach(), piece))
        for parameter in module.parameters()
        for piece in slice_of(parameter).pieces
    ]
    return parameters + state_boxes(module)


def state_boxes(module: nn.Module) -> list[Box]:
    """What the module keeps beside its parameters: the buffers that have a slice."""
    return [
        Box(piece.name, piece.global_shape, piece.offset, view_piece(buffer, piece))
        for buffer in module.buffers()
        if hasattr(buffer, "megalm_slice")
        for piece in slice_of(buffer).pieces
    ]


def cut_range(piece: Piece, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut elements [start, stop) of a piece (numbered row-major within it) into boxes.

    Yields (offset in the global tensor, shape, first element): a range that begins or ends inside a row gives a
    ragged head or tail.
    """
    yield from _range_boxes(piece.offset, piece.shape, start, stop, 0)


def _range_boxes(
    offset: tuple[int, ...], shape: tuple[int, ...], start: int, stop: int, first: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    if start >= stop:
        return
    if len(shape) == 1:
        yield (offset[0] + start,), (stop - start,), first + start
        return
    row = prod(shape[1:])
    head, tail = -(-start // row), stop // row
    if head > tail:  # within one row
        head = tail = start // row
        yield from _inside_row(offset, shape, head, start - head * row, stop - head * row, first)
        return
    if start < head * row:
        yield from _inside_row(offset, shape, head - 1, start - (head - 1) * row, row, first)
    if head < tail:
        yield (offset[0] + head, *offset[1:]), (tail - head, *shape[1:]), first + head * row
    if tail * row < stop:
        yield from _inside_row(offset, shape, tail, 0, stop - tail * row, first)


def _inside_row(
    offset: tuple[int, ...], shape: tuple[int, ...], index: int, start: int, stop: int, first: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    row = prod(shape[1:])
    for where, size, element in _range_boxes(offset[1:], shape[1:], start, stop, first + index * row):
        yield (offset[0] + index, *where), (1, *size), element
