"""Matrix products of runs of rows, each run with its own weight: the experts of a mixture, from torch's own products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.backend import get_backend, require
from megalm.ops.custom import CustomOp

# torch's kernel takes rows and leading dims in steps of 16 bytes.
_ALIGNED_BYTES = 16


def grouped_mm_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    sizes = [*counts.tolist(), x.shape[0] - int(counts.sum())]
    parts = [F.linear(part, w) for part, w in zip(x.split(sizes), weight, strict=False)]
    return torch.cat([*parts, x.new_zeros((sizes[-1], weight.shape[1]))])


def _fused(*tensors: Tensor) -> bool:
    """Whether torch's one-launch product serves: bf16 on a GPU, aligned. On a CPU it is a loop as well, with more copies."""
    first = tensors[0]
    return (
        first.is_cuda
        and hasattr(torch, "_grouped_mm")
        and first.dtype == torch.bfloat16
        and all(t.shape[-1] * t.element_size() % _ALIGNED_BYTES == 0 for t in tensors)
    )


def list_spans(counts: Tensor) -> list[tuple[int, int]]:
    """(first, end) of each run's rows. Waits for the device."""
    spans, at = [], 0
    for count in counts.tolist():
        spans.append((at, at + count))
        at += count
    return spans


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _clear_tail(out: Tensor, counts: Tensor) -> Tensor:
    """Zeros behind the last run, without waiting for the device."""
    tail = torch.arange(out.shape[0], device=out.device) >= counts.sum()
    return out.masked_fill_(tail.unsqueeze(-1), 0)


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each run of rows times its own matrix, without a gradient. Shapes: x [N, A], weight [E, A, B] (any strides) -> [N, B]"""
    if x.is_meta:
        return x.new_empty((x.shape[0], weight.shape[2]))
    if _fused(x, weight.transpose(-1, -2), weight):
        return _clear_tail(torch._grouped_mm(x, weight, offs=_ends(counts)), counts)
    out = x.new_empty((x.shape[0], weight.shape[2]))
    end = 0
    for number, (start, end) in enumerate(list_spans(counts)):
        if end > start:
            torch.mm(x[start:end], weight[number], out=out[start:end])
    out[end:].zero_()
    return out


def add_weight_gradient(out: Tensor, dy: Tensor, x: Tensor, counts: Tensor, *, empty: bool) -> None:
    """Add each run's dy^T x to its matrix of `out`, of whatever dtype; where it is `empty`, overwrite it.

    Shapes: out [E, F, H], dy [N, F], x [N, H], counts int64 [E]
    """
    if out.is_meta:
        return
    if _fused(dy, x):
        products = torch._grouped_mm(dy.t(), x, offs=_ends(counts))
        out.copy_(products) if empty else out.add_(products)
        return
    for number, (start, end) in enumerate(list_spans(counts)):
        if end == start:
            if empty:
                out[number].zero_()
        elif out.dtype != x.dtype:
            product = dy[start:end].t().mm(x[start:end])
            out[number].copy_(product) if empty else out[number].add_(product)
        elif empty:
            torch.mm(dy[start:end].t(), x[start:end], out=out[number])
        else:
            out[number].addmm_(dy[start:end].t(), x[start:end])


def _forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return grouped_product(x, weight.transpose(-1, -2), counts)


def _forward_fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = grouped_product(dy, weight, counts) if want_x else x.new_empty((0,))
    if not want_weight:
        return dx, weight.new_empty((0,))
    dweight = torch.empty_like(weight)
    add_weight_gradient(dweight, dy, x, counts, empty=True)
    return dx, dweight


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if want_x else x.new_empty((0,)), (
        torch.empty_like(weight) if want_weight else weight.new_empty((0,))
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None) -> Any:
    want_x, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if dy is None:
        return None, None, None
    dx, dweight = backward(dy.contiguous(), *ctx.saved_tensors, want_x, want_weight)
    return dx if want_x else None, dweight if want_weight else None, None


_GROUPED = CustomOp(
    "grouped_mm",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows sorted into runs of counts[e]; each run times its expert's weight transposed. Rows behind the last run give zeros.

    bf16 on a GPU is one launch of torch's grouped product; elsewhere one product a run, written in place: that waits for
    `counts`. Runs may be empty; their weight's gradient is then 0. counts must not sum to more than N (checked on a CPU).

    Shapes: x [N, H], weight [E, F, H], counts int64 [E] -> [N, F]
    """
    require(
        x.dim() == 2 and weight.dim() == 3 and weight.shape[2] == x.shape[1],
        f"grouped_mm: x is {tuple(x.shape)}, weight {tuple(weight.shape)}; they must be [rows, H] and [experts, F, H].",
    )
    require(
        x.dtype == weight.dtype and x.is_floating_point(),
        f"grouped_mm: x is {x.dtype}, weight {weight.dtype}; they must be one floating-point dtype.",
    )
    require(
        counts.shape == weight.shape[:1] and counts.dtype == torch.int64,
        f"grouped_mm: counts is {counts.dtype} {tuple(counts.shape)}; it must be int64 [{weight.shape[0]}].",
    )
    require(
        x.device == weight.device == counts.device,
        f"grouped_mm: x is on {x.device}, weight on {weight.device}, counts on {counts.device}; one device is needed.",
    )
    if counts.device.type == "cpu" and not torch.compiler.is_compiling():
        require(
            bool((counts >= 0).all()) and int(counts.sum()) <= x.shape[0],
            f"grouped_mm: counts sums to {int(counts.sum())}; its runs (none negative) must fit x's {x.shape[0]} rows.",
        )
    if get_backend() == "reference":
        return grouped_mm_reference(x, weight, counts)
    return _GROUPED(x.contiguous(), weight.contiguous(), counts.contiguous())
