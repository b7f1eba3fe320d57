"""What lies beside a collective over the sequence: parts packed, joined and summed. Contract: csrc/sequence/op.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.backend import (
    DTYPE_CODES,
    find_address,
    find_library,
    get_backend,
    get_library,
    place,
    require,
    use_native,
)
from megalm.ops.custom import CustomOp


# ------------------------------------------------------------------------------------------------------------- reference
def _order(length: int, parts: int, zigzag: bool, device: torch.device) -> Tensor:
    """Positions in the sequence in the order of the parts that hold them."""
    positions = torch.arange(length, device=device)
    if not zigzag:
        return positions
    blocks = positions.view(2, parts, -1)
    return torch.stack([blocks[0], blocks[1].flip(0)], 1).flatten()


def sequence_pack_reference(x: Tensor, parts: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    moved = x.movedim(dim, 0)
    picked = moved.index_select(0, _order(moved.shape[0], parts, zigzag, x.device))
    return picked.unflatten(0, (parts, -1)).movedim(1, 1 + out_dim).contiguous()


def sequence_join_reference(x: Tensor, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    moved = x.movedim(1 + dim, 1).flatten(0, 1)
    order = _order(moved.shape[0], x.shape[0], zigzag, x.device)
    return moved.index_select(0, order.argsort()).movedim(0, out_dim).contiguous()


def sum_parts_reference(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------- native
def _move(
    source: Tensor, source_dim: int, packed: Tensor, packed_dim: int, zigzag: bool, pack: bool, part: int
) -> None:
    """Between a whole sequence and its parts, one way or the other; `part` >= 0: of the parts only that one.

    source: [S, B, ..] or [B, S, ..]; packed: [n, S/n, B, ..] or [n, B, S/n, ..], [1, ..] for one part.
    """
    width = source.element_size()
    length, batch = source.shape[source_dim], source.shape[1 - source_dim]
    run = width * (source.numel() // max(1, length * batch))
    step, row = (run, run * length) if source_dim == 1 else (run * batch, run)
    local = packed.shape[1 + packed_dim]
    parts = length // max(1, local)
    part_step, part_row = (run, run * local) if packed_dim == 1 else (run * batch, run)
    part_size = run * local * batch
    first, count = (0, parts) if part < 0 else (part, 1)
    block = local // 2 if zigzag else local
    # (offset in the whole sequence of the first part's block, from part to part, offset inside a part): a zig-zag's
    # second blocks are taken from the end.
    pieces = [(first * block, block, 0)]
    if zigzag:
        pieces.append(((2 * parts - 1 - first) * block, -block, block))
    n = (count, block, batch)
    for start, stride, inside in pieces:
        whole_side = (source.data_ptr() + start * step, (stride * step, step, row))
        part_side = (packed.data_ptr() + inside * part_step, (part_size, part_step, part_row))
        (from_, from_stride), (to, to_stride) = (whole_side, part_side) if pack else (part_side, whole_side)
        get_library().sequence_move(*place(source), *n, *from_stride, *to_stride, run, from_, to)


def _pack(x: Tensor, parts: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    out = _pack_fake(x, parts, dim, out_dim, zigzag)
    if out.numel():
        _move(x, dim, out, out_dim, zigzag, True, -1)
    return out


def _pack_fake(x: Tensor, parts: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    local, batch = x.shape[dim] // parts, x.shape[1 - dim]
    return x.new_empty((parts, *((local, batch) if out_dim == 0 else (batch, local)), *x.shape[2:]))


def _join(x: Tensor, parts: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    out = _join_fake(x, parts, dim, out_dim, zigzag)
    if out.numel():
        _move(out, out_dim, x, dim, zigzag, False, -1)
    return out


def _join_fake(x: Tensor, parts: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    length, batch = x.shape[1 + dim] * parts, x.shape[2 - dim]
    return x.new_empty(((length, batch) if out_dim == 0 else (batch, length)) + tuple(x.shape[3:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.parts, ctx.dim, ctx.out_dim, ctx.zigzag = inputs


def _gradients(backward: Any, ctx: Any, grad: Tensor | None) -> Any:
    # One is the other's inverse, and their dims change places.
    dx = None if grad is None else backward(grad.contiguous(), ctx.parts, ctx.out_dim, ctx.dim, ctx.zigzag)
    return dx, None, None, None, None


_PACK = CustomOp(
    "sequence_pack",
    forward=_pack,
    forward_fake=_pack_fake,
    backward=_join,
    backward_fake=_join_fake,
    save=_save,
    gradients=_gradients,
)
_JOIN = CustomOp(
    "sequence_join",
    forward=_join,
    forward_fake=_join_fake,
    backward=_pack,
    backward_fake=_pack_fake,
    save=_save,
    gradients=_gradients,
)


def _served(x: Tensor) -> bool:
    """Bytes are moved, whatever they mean: any dtype."""
    found = find_library()
    if get_backend() == "reference" or found is None or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return x.device.type == "cpu" or (x.is_cuda and found.has_cuda)


def _check(op: str, length: int, parts: int, dim: int, out_dim: int, zigzag: bool) -> None:
    require(dim in (0, 1) and out_dim in (0, 1), f"{op}: dim={dim}, out_dim={out_dim}; the sequence's dim is 0 or 1.")
    require(parts >= 1, f"{op}: parts={parts}; it must be at least 1.")
    pieces = 2 * parts if zigzag else parts
    require(length % pieces == 0, f"{op}: a sequence of {length} cannot be cut into {pieces} equal blocks.")


def sequence_pack(x: Tensor, parts: int, *, dim: int = 0, out_dim: int | None = None, zigzag: bool = False) -> Tensor:
    """Every rank's part of a sequence, one behind the other as reduce-scatter and all-to-all want them, in one copy.

    A contiguous x whose first dim is cut in its own order already lies so: the result is then a view of it.
    dim, out_dim: where the sequence is in x and in each part, 0 or 1 (out_dim: as in x). zigzag: part r is blocks r and
    2 parts - 1 - r of the 2 x parts blocks.

    Shapes: x [S, B, ..] -> [n, S/n, B, ..]; with dim=1 [B, S, ..]; with out_dim=1 [n, B, S/n, ..]
    """
    out_dim = dim if out_dim is None else out_dim
    require(x.dim() >= 2, f"sequence_pack: x has shape {tuple(x.shape)}; it must be [S, B, ..] or [B, S, ..].")
    _check("sequence_pack", x.shape[dim if dim in (0, 1) else 0], parts, dim, out_dim, zigzag)
    if dim == out_dim == 0 and not zigzag:
        return x.contiguous().view(parts, x.shape[0] // parts, *x.shape[1:])
    if _served(x):
        return _PACK(x.contiguous(), parts, dim, out_dim, zigzag)
    return sequence_pack_reference(x, parts, dim, out_dim, zigzag)


def sequence_join(x: Tensor, *, dim: int = 0, out_dim: int | None = None, zigzag: bool = False) -> Tensor:
    """The whole sequence from every rank's part, as an all-gather leaves them: the inverse of `sequence_pack`, a view
    where that gives one.

    Shapes: x [n, S/n, B, ..] -> [S, B, ..]; with dim=1 x is [n, B, S/n, ..]; with out_dim=1 the result is [B, S, ..]
    """
    out_dim = dim if out_dim is None else out_dim
    require(
        x.dim() >= 3 and x.shape[0] >= 1,
        f"sequence_join: x has shape {tuple(x.shape)}; it must be [parts, S/parts, B, ..] or [parts, B, S/parts, ..].",
    )
    parts = x.shape[0]
    length = parts * x.shape[1 + (dim if dim in (0, 1) else 0)]
    _check("sequence_join", length, parts, dim, out_dim, zigzag)
    if dim == out_dim == 0 and not zigzag:
        return x.contiguous().view(length, *x.shape[2:])
    if _served(x):
        return _JOIN(x.contiguous(), parts, dim, out_dim, zigzag)
    return sequence_join_reference(x, dim, out_dim, zigzag)


@torch.no_grad()
def sequence_part(
    x: Tensor, parts: int, part: int, *, dim: int = 0, out_dim: int | None = None, zigzag: bool = False
) -> Tensor:
    """One part of what `sequence_pack` gives, in one copy of that part alone. No gradient: that would be a collective.

    Shapes: x [S, B, ..] or [B, S, ..] -> [S/n, B, ..] or [B, S/n, ..]
    """
    out_dim = dim if out_dim is None else out_dim
    require(x.dim() >= 2, f"sequence_part: x has shape {tuple(x.shape)}; it must be [S, B, ..] or [B, S, ..].")
    _check("sequence_part", x.shape[dim if dim in (0, 1) else 0], parts, dim, out_dim, zigzag)
    require(0 <= part < parts, f"sequence_part: part={part}; it must be 0 to {parts - 1}.")
    if not _served(x):
        return sequence_pack_reference(x, parts, dim, out_dim, zigzag)[part]
    run = _PART if torch.compiler.is_compiling() else _part
    return run(x.contiguous(), parts, part, dim, out_dim, zigzag)


def _part(x: Tensor, parts: int, part: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    out = _part_fake(x, parts, part, dim, out_dim, zigzag)
    if out.numel():
        _move(x, dim, out.unsqueeze(0), out_dim, zigzag, True, part)
    return out


def _part_fake(x: Tensor, parts: int, part: int, dim: int, out_dim: int, zigzag: bool) -> Tensor:
    local, batch = x.shape[dim] // parts, x.shape[1 - dim]
    return x.new_empty(((local, batch) if out_dim == 0 else (batch, local)) + tuple(x.shape[2:]))


_PART = torch.library.custom_op("megalm::sequence_part", _part, mutates_args=())
_PART.register_fake(_part_fake)


@torch.no_grad()
def sum_parts(x: Tensor) -> Tensor:
    """Sum over dim 0 in fp32, in order, rounded once: what was received from each rank. No gradient.

    Shapes: x [n, ..] -> [..]
    """
    require(x.dim() >= 1, "sum_parts: x is a scalar; it must be [parts, ..].")
    if not use_native("sum_parts", x=x):
        return sum_parts_reference(x)
    return (_SUM_PARTS if torch.compiler.is_compiling() else _sum_parts)(x.contiguous())


def _sum_parts(x: Tensor) -> Tensor:
    out = _sum_parts_fake(x)
    parts, count = x.shape[0], out.numel()
    get_library().sum_parts(*place(x), DTYPE_CODES[x.dtype], parts, count, find_address(x), find_address(out))
    return out


def _sum_parts_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1:])


_SUM_PARTS = torch.library.custom_op("megalm::sum_parts", _sum_parts, mutates_args=())
_SUM_PARTS.register_fake(_sum_parts_fake)
