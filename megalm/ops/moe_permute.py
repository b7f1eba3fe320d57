"""Tokens to their experts and back. Contract: csrc/moe_permute/op.h."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class RowMap(NamedTuple):
    """Where each assignment of a token goes when all are sorted by expert, those of one expert in their own order.

    rows [T, k] int64: the assignment's row, or -1 - row for a dropped one; those come behind all others.
    sources [T * k] int64: the assignment (token * k + j) at each row. counts [E] int64: rows of each expert.
    """

    rows: Tensor
    sources: Tensor
    counts: Tensor


# --------------------------------------------------------------------------------------------------------------- row map
def moe_row_map_reference(experts: Tensor, num_experts: int) -> RowMap:
    flat = experts.reshape(-1).long()
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    ordered, sources = key.sort(stable=True)
    rows = torch.empty_like(sources).scatter_(0, sources, torch.arange(flat.numel(), device=flat.device))
    rows = torch.where(key < num_experts, rows, -1 - rows)
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=flat.device))
    return RowMap(rows.view(experts.shape), sources, bounds.diff())


def _row_map(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    found = get_library()
    rows, sources, counts = _row_map_fake(chosen, experts)
    slots = chosen.numel()
    # At least 256 slots a chunk: below that its histogram costs more than its slots.
    chunks = min(found.ROW_MAP_CHUNKS, -(-slots // 256))
    partial = chosen.new_empty((chunks, experts + 1))
    found.moe_row_map(
        *place(chosen),
        slots,
        experts,
        chunks,
        find_address(chosen),
        find_address(rows),
        find_address(sources),
        find_address(counts),
        find_address(partial),
    )
    return rows, sources, counts


def _row_map_fake(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(chosen), chosen.new_empty((chosen.numel(),)), chosen.new_empty((experts,))


_ROW_MAP = torch.library.custom_op("megalm::moe_row_map", _row_map, mutates_args=())
_ROW_MAP.register_fake(_row_map_fake)


def moe_row_map(experts: Tensor, num_experts: int) -> RowMap:
    """Sort assignments by expert, stably. An expert outside [0, num_experts) drops the assignment.

    Shapes: experts int64 [T, k] -> RowMap
    """
    require(
        experts.dim() == 2 and experts.dtype == torch.int64,
        f"moe_row_map: experts is {experts.dtype} {tuple(experts.shape)}; it must be int64 [tokens, top_k].",
    )
    require(num_experts >= 1, f"moe_row_map: num_experts={num_experts}; it must be at least 1.")
    found = find_library()
    served = found is not None and num_experts <= found.ROW_MAP_EXPERTS and type(experts) is Tensor
    served = served and (experts.device.type == "cpu" or (experts.is_cuda and found.has_cuda))  # type: ignore[union-attr]
    if not served or get_backend() == "reference":
        return moe_row_map_reference(experts, num_experts)
    run = _ROW_MAP if torch.compiler.is_compiling() else _row_map
    return RowMap(*run(experts.contiguous(), num_experts))


# --------------------------------------------------------------------------------------------------- permute, unpermute
def moe_permute_reference(x: Tensor, row_map: RowMap) -> Tensor:
    picked = x.index_select(0, row_map.sources // max(1, row_map.rows.shape[1]))
    return picked.masked_fill((row_map.rows.reshape(-1) < 0)[row_map.sources].unsqueeze(-1), 0)


def moe_unpermute_reference(y: Tensor, row_map: RowMap, weights: Tensor | None) -> Tensor:
    rows = row_map.rows
    picked = y.index_select(0, rows.clamp(min=0).reshape(-1)).view(*rows.shape, y.shape[-1])
    picked = picked.masked_fill((rows < 0).unsqueeze(-1), 0)
    if weights is None:
        return picked.sum(1)
    return (picked * weights.unsqueeze(-1)).sum(1).to(y.dtype)


def _spread(x: Tensor, rows: Tensor, weights: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    out, dweights = _spread_fake(x, rows, weights, y)
    (tokens, top_k), size = rows.shape, x.shape[-1]
    get_library().moe_spread(
        *place(x),
        DTYPE_CODES[x.dtype],
        tokens,
        top_k,
        size,
        find_address(x),
        find_address(y),
        find_address(rows),
        find_address(weights),
        find_address(out),
        find_address(dweights),
    )
    return out, dweights


def _spread_fake(x: Tensor, rows: Tensor, weights: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    out = x.new_empty((rows.shape[0] * rows.shape[1], x.shape[-1]))
    return out, rows.new_empty(rows.shape if y is not None else (0,), dtype=torch.float32)


def _collect(x: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    out = _collect_fake(x, rows, weights)
    (tokens, top_k), size = rows.shape, x.shape[-1]
    get_library().moe_collect(
        *place(x),
        DTYPE_CODES[x.dtype],
        tokens,
        top_k,
        size,
        find_address(x),
        find_address(rows),
        find_address(weights),
        find_address(out),
    )
    return out


def _collect_fake(x: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    return x.new_empty((rows.shape[0], x.shape[-1]))


def _permute(x: Tensor, rows: Tensor) -> Tensor:
    return _spread(x, rows, None, None)[0]


def _permute_fake(x: Tensor, rows: Tensor) -> Tensor:
    return _spread_fake(x, rows, None, None)[0]


def _permute_backward(dy: Tensor, rows: Tensor) -> Tensor:
    return _collect(dy, rows, None)


def _permute_backward_fake(dy: Tensor, rows: Tensor) -> Tensor:
    return _collect_fake(dy, rows, None)


def _permute_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_gradients(backward: Any, ctx: Any, dy: Tensor | None) -> Any:
    return None if dy is None else backward(dy.contiguous(), *ctx.saved_tensors), None


def _unpermute_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    y, rows, weights = inputs
    ctx.save_for_backward(y if weights is not None and ctx.needs_input_grad[2] else None, rows, weights)


def _unpermute_gradients(backward: Any, ctx: Any, dout: Tensor | None) -> Any:
    if dout is None:
        return None, None, None
    y, rows, weights = ctx.saved_tensors
    dy, dweights = backward(dout.contiguous(), rows, weights, y)
    return dy, None, dweights if y is not None else None


_PERMUTE = CustomOp(
    "moe_permute",
    forward=_permute,
    forward_fake=_permute_fake,
    backward=_permute_backward,
    backward_fake=_permute_backward_fake,
    save=_permute_save,
    gradients=_permute_gradients,
)
_UNPERMUTE = CustomOp(
    "moe_unpermute",
    forward=_collect,
    forward_fake=_collect_fake,
    backward=_spread,
    backward_fake=_spread_fake,
    save=_unpermute_save,
    gradients=_unpermute_gradients,
)


def _check(op: str, row_map: RowMap, device: torch.device) -> None:
    rows, sources, _ = row_map
    require(
        rows.dim() == 2 and rows.dtype == torch.int64 and sources.dtype == torch.int64,
        f"{op}: row_map.rows is {rows.dtype} {tuple(rows.shape)}; give what moe_row_map returned.",
    )
    require(
        sources.shape == (rows.numel(),),
        f"{op}: row_map.sources has shape {tuple(sources.shape)} for rows {tuple(rows.shape)}.",
    )
    require(rows.device == device, f"{op}: row_map is on {rows.device}, its tokens on {device}.")


def moe_permute(x: Tensor, row_map: RowMap) -> Tensor:
    """Each token's row to the place of each of its assignments: rows sorted by expert. Dropped assignments give zeros.

    Shapes: x [T, H] -> [T * k, H]
    """
    _check("moe_permute", row_map, x.device)
    require(
        x.dim() == 2 and x.shape[0] == row_map.rows.shape[0],
        f"moe_permute: x has shape {tuple(x.shape)}; the row map is for [{row_map.rows.shape[0]}, hidden].",
    )
    if use_native("moe_permute", x=x):
        return _PERMUTE(x.contiguous(), row_map.rows.contiguous())
    return moe_permute_reference(x, row_map)


def moe_unpermute(y: Tensor, row_map: RowMap, weights: Tensor | None = None) -> Tensor:
    """Each token's sum of its assignments' rows, times their weights if there are any; dropped assignments add nothing.

    The sum is fp32, in the order of choice, rounded once.

    Shapes: y [T * k, H], weights fp32 [T, k] -> [T, H]
    """
    _check("moe_unpermute", row_map, y.device)
    rows = row_map.rows
    require(
        y.dim() == 2 and y.shape[0] == rows.numel(),
        f"moe_unpermute: y has shape {tuple(y.shape)}; the row map is for [{rows.numel()}, hidden].",
    )
    if weights is not None:
        require(
            weights.shape == rows.shape and weights.device == y.device,
            f"moe_unpermute: weights has shape {tuple(weights.shape)} on {weights.device}; it must be "
            f"{list(rows.shape)} on {y.device}.",
        )
    if use_native("moe_unpermute", y=y) and (weights is None or weights.dtype == torch.float32):
        return _UNPERMUTE(y.contiguous(), rows.contiguous(), None if weights is None else weights.contiguous())
    return moe_unpermute_reference(y, row_map, weights)
