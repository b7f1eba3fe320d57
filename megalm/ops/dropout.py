"""Bias, dropout and residual add in one pass, with a mask that is computed and never stored. Contract:
csrc/dropout/op.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native
from megalm.ops.custom import CustomOp

_GOLDEN, _COLUMN = 0x9E3779B97F4A7C15, 0x9E3779B1
_LOW = 0xFFFFFFFF


def _signed(value: int) -> int:
    """The 64-bit pattern as torch's int64 has it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _threshold(p: float) -> int:
    return min(round(p * 2**32), _LOW)


def keep_mask(
    rows: int,
    size: int,
    p: float,
    seed: int,
    *,
    row_ids: Tensor | None = None,
    first_column: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which elements are kept, the same on every machine and device: bool [rows, size]."""
    ids = torch.arange(rows, device=device) if row_ids is None else row_ids
    state = (ids + 1) * _signed(_GOLDEN) + _signed(seed)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shifted(state, 31)
    low, high = (state & _LOW)[:, None], _shifted(state, 32)[:, None]
    columns = torch.arange(first_column, first_column + size, device=ids.device)
    h = (low + columns * _COLUMN) & _LOW
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _LOW
    h = (((h ^ (h >> 15)) + high & _LOW) * 0x846CA68B) & _LOW
    return h ^ (h >> 16) >= _threshold(p)


def bias_dropout_add_reference(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    p: float,
    seed: int,
    row_ids: Tensor | None = None,
    first_column: int = 0,
) -> Tensor:
    size = x.shape[-1]
    keep = keep_mask(
        x.numel() // max(1, size), size, p, seed, row_ids=row_ids, first_column=first_column, device=x.device
    )
    wide = x if bias is None else x + bias
    dropped = torch.where(keep.view(x.shape), wide / (1.0 - p), 0.0).to(x.dtype)
    return dropped if residual is None else residual + dropped


def _run(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    p: float,
    seed: int,
    row_ids: Tensor | None,
    first_column: int,
) -> Tensor:
    y = torch.empty_like(x)
    size = x.shape[-1]
    rows, threshold, scale = x.numel() // max(1, size), _threshold(p), 1.0 / (1.0 - p)
    get_library().dropout_add(
        *place(x),
        DTYPE_CODES[x.dtype],
        rows,
        size,
        seed & ((1 << 64) - 1),
        threshold,
        scale,
        first_column & _LOW,
        find_address(row_ids),
        find_address(x),
        find_address(bias),
        find_address(residual),
        find_address(y),
    )
    return y


def _run_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(dy: Tensor, p: float, seed: int, row_ids: Tensor | None, first_column: int) -> Tensor:
    return _run(dy, None, None, p, seed, row_ids, first_column)


def _backward_fake(dy: Tensor, p: float, seed: int, row_ids: Tensor | None, first_column: int) -> Tensor:
    return torch.empty_like(dy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, residual, bias, ctx.p, ctx.seed, row_ids, ctx.first_column = inputs
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.save_for_backward(row_ids)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None, None, None, None, None, None
    dx = backward(dy.contiguous(), ctx.p, ctx.seed, ctx.saved_tensors[0], ctx.first_column)
    dbias = dx.reshape(-1, dx.shape[-1]).sum(0) if ctx.has_bias else None
    return dx, dy if ctx.has_residual else None, dbias, None, None, None, None


_DROPOUT = CustomOp(
    "bias_dropout_add",
    forward=_run,
    forward_fake=_run_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def bias_dropout_add(
    x: Tensor,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    p: float,
    seed: int,
    row_ids: Tensor | None = None,
    first_column: int = 0,
) -> Tensor:
    """residual + dropout(x + bias): an element is dropped with probability p, and scaled by 1 / (1 - p) if not.

    Whether one is kept is a function of (seed, its row's id, its column) alone: computed again in backward, alike on
    every device, and alike for a shard that says where it lies: row_ids names its rows (default 0, 1, ..), and
    first_column the first of its columns.

    Shapes: x, residual [.., F], bias [F], row_ids int64 [rows of x] -> [.., F]
    Source: Srivastava et al. 2014; the hash: csrc/dropout/op.h
    """
    require(0.0 <= p < 1.0, f"bias_dropout_add: p={p}; it must be at least 0 and below 1.")
    require(x.dim() >= 1, f"bias_dropout_add: x has shape {tuple(x.shape)}; it needs at least one dim.")
    require(
        residual is None or residual.shape == x.shape,
        f"bias_dropout_add: residual has shape {None if residual is None else tuple(residual.shape)}, x "
        f"{tuple(x.shape)}; they must be equal.",
    )
    require(
        bias is None or tuple(bias.shape) == (x.shape[-1],),
        f"bias_dropout_add: bias has shape {None if bias is None else tuple(bias.shape)}; it must be [{x.shape[-1]}].",
    )
    if row_ids is not None:
        rows = x.numel() // max(1, x.shape[-1])
        require(
            row_ids.dtype == torch.int64 and row_ids.numel() == rows and row_ids.device == x.device,
            f"bias_dropout_add: row_ids is {row_ids.dtype} {tuple(row_ids.shape)} on {row_ids.device}; it must be "
            f"torch.int64 with {rows} elements on {x.device}.",
        )
        row_ids = row_ids.reshape(-1).contiguous()
    require(first_column >= 0, f"bias_dropout_add: first_column={first_column}; it must be at least 0.")
    if not use_native("bias_dropout_add", x=x, residual=residual, bias=bias):
        return bias_dropout_add_reference(x, residual, bias, p, seed, row_ids, first_column)
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    return _DROPOUT(x.contiguous(), residual, bias, p, _signed(seed), row_ids, first_column)
