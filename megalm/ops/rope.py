"""Rotary position embedding. Contract: csrc/rope/op.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, address, loaded_library, place, require, use_native
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
    sequence, batch, heads, size = x.shape
    if size > 1 and x.stride(3) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    loaded_library().rotary(
        *place(x),
        DTYPE_CODES[x.dtype],
        interleaved,
        inverse,
        sequence,
        batch,
        heads,
        size,
        cos.shape[-1],
        x.stride(0),
        x.stride(1),
        x.stride(2),
        cos.stride(0),
        cos.stride(1) if cos.shape[1] > 1 else 0,
        address(x),
        address(cos),
        address(sin),
        address(y),
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


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs of the leading 2R elements of each head by their position's angle; cos and sin get no gradient.

    x may be a strided view with a dense last dim (a cut of a packed projection): it is not copied first.

    Shapes: x [S, B, A, d], cos and sin fp32 [S, 1 or B, 1, R] with 2R <= d -> [S, B, A, d] contiguous
    Source: Su et al. 2021 (arXiv:2104.09864)
    """
    require(x.dim() == 4, f"rotary: x has shape {tuple(x.shape)}; it must be [sequence, batch, heads, size].")
    allowed = [(x.shape[0], batch, 1) for batch in (1, x.shape[1])]
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            table.dim() == 4 and tuple(table.shape[:3]) in allowed and 2 * table.shape[3] <= x.shape[3],
            f"rotary: {name} has shape {tuple(table.shape)}; for x {tuple(x.shape)} it must be "
            f"[{x.shape[0]}, 1 or {x.shape[1]}, 1, at most {x.shape[3] // 2}].",
        )
    require(cos.shape == sin.shape, f"rotary: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; they must be equal.")
    tables_fit = cos.dtype == sin.dtype == torch.float32 and cos.device == sin.device == x.device
    if use_native("rotary", x=x) and tables_fit:
        if cos.stride() != sin.stride() or cos.stride(3) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        return _ROTARY(x, cos, sin, interleaved)
    return rotary_reference(x, cos, sin, interleaved)
