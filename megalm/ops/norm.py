"""RMSNorm and LayerNorm over the last dim, with an optional residual add in front. Contract: csrc/norm/op.h."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.ops.backend import DTYPE_CODES, find_address, find_vendor, get_library, place, use_native
from megalm.ops.custom import CustomOp


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _statistics(x: Tensor, layer_norm: bool) -> Tensor:
    return x.new_empty((2 if layer_norm else 1, x.numel() // max(1, x.shape[-1])), dtype=torch.float32)


def _run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    y = torch.empty_like(x)
    h = torch.empty_like(x) if residual is not None else None
    statistics = _statistics(x, layer_norm)
    rows, size = statistics.shape[1], x.shape[-1]
    mean, rstd = find_address(statistics[1]) if layer_norm else 0, find_address(statistics)
    get_library().norm_forward(
        *place(x),
        DTYPE_CODES[x.dtype],
        layer_norm,
        rows,
        size,
        eps,
        find_address(x),
        find_address(residual),
        find_address(weight),
        find_address(bias),
        find_address(h),
        find_address(y),
        mean,
        rstd,
    )
    return y, h, statistics


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool) -> tuple[Tensor, Tensor]:
    y, _, statistics = _run_forward(x, None, weight, bias, eps, layer_norm)
    return y, statistics


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _statistics(x, layer_norm)


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, statistics = _run_forward(x, residual, weight, bias, eps, layer_norm)
    assert h is not None
    return y, h, statistics


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), _statistics(x, layer_norm)


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, statistics: Tensor, layer_norm: bool, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    library = get_library()
    rows, size = statistics.shape[1], h.shape[-1]
    mean, rstd = find_address(statistics[1]) if layer_norm else 0, find_address(statistics)
    dx, dweight, dbias = _backward_fake(dy, dh, h, weight, statistics, layer_norm, has_bias)
    where = place(h)
    row_blocks = library.NORM_ROW_BLOCKS if where[0] < 0 else library.NORM_ROW_BLOCKS_CUDA
    partial = h.new_empty(min(rows, row_blocks) * 2 * (size + library.NORM_SLACK), dtype=torch.float32)
    library.norm_backward(
        *where,
        DTYPE_CODES[h.dtype],
        layer_norm,
        rows,
        size,
        row_blocks,
        find_address(dy),
        find_address(dh),
        find_address(h),
        find_address(weight),
        mean,
        rstd,
        find_address(dx),
        find_address(dweight),
        find_address(dbias) if has_bias else 0,
        find_address(partial),
    )
    return dx, dweight, dbias


def _backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, statistics: Tensor, layer_norm: bool, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(weight), weight.new_empty(weight.shape if has_bias else (0,))


def _gradients(backward: Any, ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight, statistics = ctx.saved_tensors
    if dy is None:
        return dh, None, None
    if dh is not None:
        dh = dh.contiguous()
    dx, dweight, dbias = backward(dy.contiguous(), dh, h, weight, statistics, ctx.layer_norm, ctx.has_bias)
    return dx, dweight, dbias if ctx.has_bias else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _, layer_norm = inputs
    ctx.save_for_backward(x, weight, output[-1])
    ctx.layer_norm, ctx.has_bias = layer_norm, bias is not None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, (output[1], *inputs[2:]), output)


def _norm_gradients(backward: Any, ctx: Any, dy: Tensor | None, dstatistics: Tensor | None) -> Any:
    return (*_gradients(backward, ctx, dy, None), None, None)


def _add_gradients(backward: Any, ctx: Any, dy: Tensor | None, dh: Tensor | None, dstatistics: Tensor | None) -> Any:
    dx, dweight, dbias = _gradients(backward, ctx, dy, dh)
    return dx, dx, dweight, dbias, None, None


_NORM = CustomOp(
    "norm",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_norm_gradients,
)
_ADD_NORM = CustomOp(
    "add_norm",
    forward=_add_forward,
    forward_fake=_add_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_add_save,
    gradients=_add_gradients,
)


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    # Messages are made where they are needed: making them takes longer than looking.
    shape, size = x.shape, weight.shape
    if len(size) != 1:
        raise ConfigError(f"{op}: weight has shape {tuple(size)}; it must be [size].")
    if shape[-1:] != size or size[0] == 0:
        raise ConfigError(
            f"{op}: x has shape {tuple(shape)}; its last dim must be weight's size, {size[0]}, and not 0."
        )
    if residual is not None and residual.shape != shape:
        raise ConfigError(f"{op}: residual has shape {tuple(residual.shape)}, x {tuple(shape)}; they must be equal.")
    if bias is not None and bias.shape != size:
        raise ConfigError(f"{op}: bias has shape {tuple(bias.shape)}, weight {tuple(size)}; they must be equal.")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight.

    Shapes: x [.., N], weight [N] -> [.., N]
    Source: Zhang and Sennrich 2019 (arXiv:1910.07467)
    """
    _check("rms_norm", x, None, weight, None)
    other = find_vendor("rms_norm", x)
    if other is not None:
        return other(x, weight, eps)
    if use_native("rms_norm", x=x, weight=weight):
        return _NORM(x.contiguous(), weight.contiguous(), None, eps, False)[0]
    return rms_norm_reference(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight (+ bias).

    Shapes: x [.., N], weight, bias [N] -> [.., N]
    Source: Ba et al. 2016 (arXiv:1607.06450)
    """
    _check("layer_norm", x, None, weight, bias)
    other = find_vendor("layer_norm", x)
    if other is not None:
        return other(x, weight, bias, eps)
    if use_native("layer_norm", x=x, weight=weight, bias=bias):
        bias = None if bias is None else bias.contiguous()
        return _NORM(x.contiguous(), weight.contiguous(), bias, eps, True)[0]
    return layer_norm_reference(x, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual), and x + residual, in one pass.

    Shapes: x, residual [.., N], weight [N] -> [.., N], [.., N]
    """
    _check("add_rms_norm", x, residual, weight, None)
    other = find_vendor("add_rms_norm", x)
    if other is not None:
        return other(x, residual, weight, eps)
    if use_native("add_rms_norm", x=x, residual=residual, weight=weight):
        y, h, _ = _ADD_NORM(x.contiguous(), residual.contiguous(), weight.contiguous(), None, eps, False)
        return y, h
    h = x + residual
    return rms_norm_reference(h, weight, eps), h


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual), and x + residual, in one pass.

    Shapes: x, residual [.., N], weight, bias [N] -> [.., N], [.., N]
    """
    _check("add_layer_norm", x, residual, weight, bias)
    other = find_vendor("add_layer_norm", x)
    if other is not None:
        return other(x, residual, weight, bias, eps)
    if use_native("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias):
        bias = None if bias is None else bias.contiguous()
        y, h, _ = _ADD_NORM(x.contiguous(), residual.contiguous(), weight.contiguous(), bias, eps, True)
        return y, h
    h = x + residual
    return layer_norm_reference(h, weight, bias, eps), h
