"""Causal softmax of attention's scores, with ALiBi's biases and within documents. Contract: csrc/softmax/op.h.

For attention that torch's fused kernels do not serve; they are faster where they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native
from megalm.ops.custom import CustomOp


def find_document_starts(document_ids: Tensor) -> Tensor:
    """Find the first position of the document that each position is in: equal neighbours are one document.

    Shapes: document_ids [B, S] integers -> int32 [B, S]
    """
    require(
        document_ids.dim() == 2,
        f"find_document_starts: document_ids has shape {tuple(document_ids.shape)}; it must be [batch, positions].",
    )
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    changes = torch.zeros_like(document_ids, dtype=torch.bool)
    changes[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(changes, positions, 0).cummax(1).values.to(torch.int32)


def causal_softmax_reference(
    scores: Tensor, scale: float = 1.0, slopes: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    queries, keys = scores.shape[2:]
    key = torch.arange(keys, device=scores.device)
    position = key[keys - queries :]
    hidden = key > position[:, None]
    values = scores * scale
    if slopes is not None:
        values = values - slopes[:, None, None].to(values.dtype) * (position[:, None] - key)
    if starts is not None:
        hidden = hidden | (key < starts[:, keys - queries :, None]).unsqueeze(1)
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.masked_fill(hidden, -torch.inf).softmax(-1).to(scores.dtype)


def _forward(scores: Tensor, scale: float, slopes: Tensor | None, starts: Tensor | None) -> Tensor:
    y = torch.empty_like(scores)
    batch, heads, queries, keys = scores.shape
    x = find_address(scores)
    get_library().softmax_forward(
        *place(scores),
        DTYPE_CODES[scores.dtype],
        batch,
        heads,
        queries,
        keys,
        scale,
        x,
        find_address(slopes),
        find_address(starts),
        find_address(y),
    )
    return y


def _forward_fake(scores: Tensor, scale: float, slopes: Tensor | None, starts: Tensor | None) -> Tensor:
    return torch.empty_like(scores)


def _backward(dy: Tensor, y: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    dx = torch.empty_like(y)
    batch, heads, queries, keys = y.shape
    get_library().softmax_backward(
        *place(y),
        DTYPE_CODES[y.dtype],
        batch,
        heads,
        queries,
        keys,
        scale,
        find_address(dy),
        find_address(y),
        find_address(starts),
        find_address(dx),
    )
    return dx


def _backward_fake(dy: Tensor, y: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    return torch.empty_like(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.scale = inputs[1]
    ctx.save_for_backward(output, inputs[3])


def _gradients(backward: Any, ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None, None, None
    y, starts = ctx.saved_tensors
    return backward(dy.contiguous(), y, ctx.scale, starts), None, None, None


_SOFTMAX = CustomOp(
    "causal_softmax",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def causal_softmax(
    scores: Tensor, *, scale: float = 1.0, slopes: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """softmax over the keys k with starts <= k <= position of scale * scores - slope * (position - k), else 0.

    The queries are the last of the keys' positions. starts: the first key that each position sees
    (`find_document_starts`); slopes: ALiBi's, one for each head. Neither gets a gradient.

    Shapes: scores [B, A, Q, K] with Q <= K, slopes fp32 [A], starts int32 [B, K] -> [B, A, Q, K]
    Source: Press et al. 2021 (arXiv:2108.12409)
    """
    require(
        scores.dim() == 4 and scores.shape[2] <= scores.shape[3],
        f"causal_softmax: scores has shape {tuple(scores.shape)}; it must be [batch, heads, queries, keys] with no more "
        "queries than keys.",
    )
    batch, heads, _, keys = scores.shape
    for name, tensor, shape, dtype in (
        ("slopes", slopes, (heads,), torch.float32),
        ("starts", starts, (batch, keys), torch.int32),
    ):
        require(
            tensor is None
            or (tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device == scores.device),
            f"causal_softmax: {name} is "
            + ("None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")
            + f"; it must be {dtype} {shape} on {scores.device}.",
        )
    if not use_native("causal_softmax", scores=scores):
        return causal_softmax_reference(scores, scale, slopes, starts)
    slopes = None if slopes is None else slopes.contiguous()
    starts = None if starts is None else starts.contiguous()
    return _SOFTMAX(scores.contiguous(), scale, slopes, starts)
