"""Rotary position embedding. Contract: csrc/rope/op.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native
from megalm.ops.custom import CustomOp


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        parts = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        parts = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    parts = parts.to(x.dtype)
    return torch.cat((parts, rest), dim=-1) if rest.shape[-1] else parts


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if x.shape[3] > 1 and x.stride(3) != 1:
        x = x.contiguous()
    return _rotate_into(torch.empty(x.shape, dtype=x.dtype, device=x.device), x, cos, sin, interleaved, inverse)


def _rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    sequence, batch, heads, size = x.shape
    pairs = cos.shape[-1]
    sequence_stride, batch_stride, head_stride, _ = x.stride()
    y_sequence_stride, y_batch_stride, y_head_stride, _ = y.stride()
    table_sequence_stride, table_batch_stride = cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0
    get_library().rotary(
        *place(x),
        DTYPE_CODES[x.dtype],
        interleaved,
        inverse,
        sequence,
        batch,
        heads,
        size,
        pairs,
        sequence_stride,
        batch_stride,
        head_stride,
        y_sequence_stride,
        y_batch_stride,
        y_head_stride,
        table_sequence_stride,
        table_batch_stride,
        find_address(x),
        find_address(cos),
        find_address(sin),
        find_address(y),
    )
    return y


def _forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(x, cos, sin, interleaved, False)


def _forward_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(dy, cos, sin, interleaved, True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None, None, None
    return backward(dy, *ctx.saved_tensors, ctx.interleaved), None, None, None


_ROTARY = CustomOp(
    "rotary",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_forward_fake,
    save=_save,
    gradients=_gradients,
)


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    require(x.dim() == 4, f"{op}: x has shape {tuple(x.shape)}; it must be [sequence, batch, heads, size].")
    allowed = [(x.shape[0], batch, 1) for batch in (1, x.shape[1])]
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            table.dim() == 4 and tuple(table.shape[:3]) in allowed and 2 * table.shape[3] <= x.shape[3],
            f"{op}: {name} has shape {tuple(table.shape)}; for x {tuple(x.shape)} it must be "
            f"[{x.shape[0]}, 1 or {x.shape[1]}, 1, at most {x.shape[3] // 2}].",
        )
        require(table.device == x.device, f"{op}: {name} is on {table.device}, x on {x.device}.")
    require(cos.shape == sin.shape, f"{op}: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; they must be equal.")


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin with the same strides and a dense last dim."""
    return (cos, sin) if cos.stride() == sin.stride() and cos.stride(3) == 1 else (cos.contiguous(), sin.contiguous())


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs of the leading 2R elements of each head by their position's angle; cos and sin get no gradient.

    x may be a strided view with a dense last dim (a cut of a packed projection): it is not copied first.

    Shapes: x [S, B, A, d], cos and sin fp32 [S, 1 or B, 1, R] with 2R <= d -> [S, B, A, d] contiguous
    Source: Su et al. 2021 (arXiv:2104.09864)
    """
    _check("rotary", x, cos, sin)
    if use_native("rotary", x=x) and cos.dtype == sin.dtype == torch.float32:
        return _ROTARY(x, *_tables(cos, sin), interleaved)
    return rotary_reference(x, cos, sin, interleaved)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.mark_dirty(x)
        _turn(x, cos, sin, interleaved)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        # Not in place: who else holds dy is unknown here.
        return rotary(dy, ctx.saved_tensors[0], -ctx.saved_tensors[1], ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    dense = x.shape[3] <= 1 or x.stride(3) == 1
    if use_native("rotary_", x=x) and dense and cos.dtype == sin.dtype == torch.float32:
        _rotate_into(x, x, *_tables(cos, sin), interleaved, False)
    else:
        x.copy_(rotary_reference(x, cos, sin, interleaved))


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary` in place; x may be a strided view, such as a cut of a packed projection. Returns x.

    As with every operation in place: no leaf that wants a gradient, and nothing whose old values backward needs.

    Shapes: as `rotary`
    """
    _check("rotary_", x, cos, sin)
    if torch.compiler.is_compiling():  # what is in place is the compiler's to decide
        return x.copy_(rotary(x, cos, sin, interleaved))
    return _InPlace.apply(x, cos, sin, interleaved)
