"""The MLP's pointwise functions, gated and plain. Contract: csrc/activation/op.h."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native
from megalm.ops.custom import CustomOp

_SILU, _GELU, _GELU_TANH = 0, 1, 2


def swiglu_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def bias_gelu_reference(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def _forward(x: Tensor, bias: Tensor | None, kind: int, gated: bool, inplace_backward: bool) -> Tensor:
    y = _forward_fake(x, bias, kind, gated, inplace_backward)
    size = y.shape[-1]
    rows = y.numel() // max(1, size)
    get_library().activation_forward(
        *place(x),
        DTYPE_CODES[x.dtype],
        kind,
        gated,
        rows,
        size,
        find_address(x),
        find_address(bias),
        find_address(y),
    )
    return y


def _forward_fake(x: Tensor, bias: Tensor | None, kind: int, gated: bool, inplace_backward: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2)) if gated else torch.empty_like(x)


def _backward_into(
    dx: Tensor, dy: Tensor, x: Tensor, bias: Tensor | None, kind: int, gated: bool
) -> tuple[Tensor, Tensor]:
    library, where, size = get_library(), place(x), dy.shape[-1]
    dbias = x.new_empty(0 if bias is None else size)
    row_blocks = library.ACTIVATION_ROW_BLOCKS if where[0] < 0 else library.ACTIVATION_ROW_BLOCKS_CUDA
    rows = dy.numel() // max(1, size)
    partial = None if bias is None else x.new_empty(min(rows, row_blocks) * size, dtype=torch.float32)
    library.activation_backward(
        *where,
        DTYPE_CODES[x.dtype],
        kind,
        gated,
        rows,
        size,
        find_address(dy),
        find_address(x),
        find_address(bias),
        find_address(dx),
        find_address(dbias),
        row_blocks,
        find_address(partial),
    )
    return dx, dbias


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None, kind: int, gated: bool) -> tuple[Tensor, Tensor]:
    return _backward_into(torch.empty_like(x), dy, x, bias, kind, gated)


def _backward_fake(dy: Tensor, x: Tensor, bias: Tensor | None, kind: int, gated: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0 if bias is None else x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, bias, ctx.kind, ctx.gated, ctx.inplace_backward = inputs
    ctx.spent = False
    ctx.save_for_backward(x, bias)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None, None, None, None
    x, bias = ctx.saved_tensors
    dy = dy.contiguous()
    if ctx.inplace_backward and backward is _backward:
        require(
            not ctx.spent, "an activation with inplace_backward=True has one backward pass only: its input is gone."
        )
        ctx.spent = True
        dx, dbias = _backward_into(x.detach(), dy, x, bias, ctx.kind, ctx.gated)
    else:
        dx, dbias = backward(dy, x, bias, ctx.kind, ctx.gated)
    return dx, None if bias is None else dbias, None, None, None


_ACTIVATION = CustomOp(
    "activation",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def _gated(op: str, x: Tensor, kind: int, inplace_backward: bool) -> Tensor | None:
    require(
        x.dim() >= 1 and x.shape[-1] % 2 == 0 and x.shape[-1] > 0,
        f"{op}: x has shape {tuple(x.shape)}; its last dim must be [gate; up] of equal sizes.",
    )
    if not use_native(op, x=x):
        return None
    return _ACTIVATION(x.contiguous(), None, kind, True, inplace_backward)


def swiglu(x: Tensor, *, inplace_backward: bool = False) -> Tensor:
    """silu(gate) * up.

    inplace_backward: the gradient is written over x (eager, native backend), which nothing else may read afterwards.

    Shapes: x [.., 2F] = [gate; up] -> [.., F]
    Source: Shazeer 2020 (arXiv:2002.05202)
    """
    y = _gated("swiglu", x, _SILU, inplace_backward)
    return swiglu_reference(x) if y is None else y


def geglu(x: Tensor, approximate: str = "none", *, inplace_backward: bool = False) -> Tensor:
    """gelu(gate) * up; approximate and inplace_backward as in `bias_gelu` and `swiglu`.

    Shapes: x [.., 2F] = [gate; up] -> [.., F]
    """
    y = _gated("geglu", x, _gelu_kind("geglu", approximate), inplace_backward)
    return geglu_reference(x, approximate) if y is None else y


def _gelu_kind(op: str, approximate: str) -> int:
    require(approximate in ("none", "tanh"), f"{op}: approximate={approximate!r}; it must be none or tanh.")
    return _GELU_TANH if approximate == "tanh" else _GELU


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, inplace_backward: bool = False
) -> Tensor:
    """gelu(x + bias), exact or (approximate="tanh") by the tanh formula; inplace_backward as in `swiglu`.

    Shapes: x [.., F], bias [F] -> [.., F]
    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415)
    """
    kind = _gelu_kind("bias_gelu", approximate)
    require(x.dim() >= 1, f"bias_gelu: x has shape {tuple(x.shape)}; it needs at least one dim.")
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == x.shape[-1],
            f"bias_gelu: bias has shape {tuple(bias.shape)}; it must be [{x.shape[-1]}], x's last dim.",
        )
    if not use_native("bias_gelu", x=x, bias=bias):
        return bias_gelu_reference(x, bias, approximate)
    bias = None if bias is None else bias.contiguous()
    return _ACTIVATION(x.contiguous(), bias, kind, False, inplace_backward)
