"""The loss of hidden @ weight.T by chunks of positions, so that all logits are never held. See `cross_entropy` for the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.backend import require
from megalm.ops.cross_entropy import LossOptions


class LinearLoss(NamedTuple):
    """What `linear_cross_entropy_parts` computes in one pass over the positions.

    total: sum of mask * loss, fp32 scalar. losses: mask * loss of each position, fp32 [N].
    dhidden, dweight: the total's gradients, [N, H] in hidden's dtype and fp32 [V/t, H]; None where not wanted.
    """

    total: Tensor
    losses: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


@torch.no_grad()
def linear_cross_entropy_parts(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    chunk: int = 512,
    vocab_size: int | None = None,
    first: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduce: Callable[[Tensor, str], Tensor] | None = None,
    want_hidden: bool = True,
    want_weight: bool = True,
) -> LinearLoss:
    """The loss of hidden @ weight.T with its gradients, `chunk` positions at a time: never all logits.

    Where the vocabulary is split over ranks, dhidden is this rank's part of it: sum it over them.

    Shapes: hidden [N, H], weight [V/t, H], labels int64 [N], mask fp32 [N]
    Memory: chunk * V/t logits beside the result
    Comm:   with reduce, for each chunk an all-reduce of [chunk] (max) and of [2, chunk] (sum)
    """
    require(
        hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
        f"linear_cross_entropy: hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}; they must be [N, H] and "
        "[V, H].",
    )
    require(chunk >= 1, f"linear_cross_entropy: chunk={chunk}; it must be at least 1.")
    for name, tensor in (("labels", labels), ("mask", mask)):
        require(
            tensor is None or tensor.shape == hidden.shape[:1],
            f"linear_cross_entropy: {name} must have shape ({hidden.shape[0]},).",
        )
    width = weight.shape[0]
    vocab_size = first + width if vocab_size is None else vocab_size
    columns = max(0, min(width, vocab_size - first))
    options = LossOptions(first, columns, vocab_size, z_loss, label_smoothing, reduce, True)
    dhidden = torch.empty_like(hidden) if want_hidden else None
    dweight = torch.empty_like(weight, dtype=torch.float32) if want_weight else None
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if dweight is not None and not hidden.shape[0]:
        dweight.zero_()
    for begin in range(0, hidden.shape[0], chunk):
        block = slice(begin, begin + chunk)
        logits, own_labels = hidden[block] @ weight.t(), labels[block]
        joined = options.join(logits, own_labels)
        loss, counted = options.loss(joined, own_labels)
        grad = torch.ones_like(loss) if mask is None else mask[block].float()
        torch.mul(loss, grad, out=losses[block])
        if dhidden is None and dweight is None:
            continue
        dlogits = options.gradient(logits, own_labels, joined.log_z, counted, grad, inplace=True)
        if dhidden is not None:
            torch.mm(dlogits, weight, out=dhidden[block])
        if dweight is None:
            continue
        if dlogits.dtype != torch.float32:
            product = dlogits.t() @ hidden[block]
            dweight.add_(product) if begin else dweight.copy_(product)
        elif begin:
            dweight.addmm_(dlogits.t(), hidden[block])
        else:
            torch.mm(dlogits.t(), hidden[block], out=dweight)
    return LinearLoss(losses.sum(), losses, dhidden, dweight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        parts = linear_cross_entropy_parts(
            hidden, weight, labels, mask, want_hidden=wanted[0], want_weight=wanted[1], **options
        )
        ctx.dhidden, ctx.dweight, ctx.dtype = parts.dhidden, parts.dweight, weight.dtype
        return parts.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        dhidden, dweight = ctx.dhidden, ctx.dweight
        require(
            dhidden is not None or dweight is not None, "linear_cross_entropy: its one backward pass has been made."
        )
        ctx.dhidden = ctx.dweight = None
        if dhidden is not None:
            dhidden = dhidden.mul_(grad)
        if dweight is not None:
            dweight = dweight.mul_(grad).to(ctx.dtype)
        return dhidden, dweight, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    chunk: int = 512,
    vocab_size: int | None = None,
    first: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduce: Callable[[Tensor, str], Tensor] | None = None,
) -> Tensor:
    """Sum over positions of mask * cross_entropy(hidden @ weight.T, labels), without ever holding all logits.

    `chunk` positions at a time: logits, loss, and both gradients, which wait for backward's factor. One backward pass.
    Where the vocabulary is split over ranks, hidden's gradient is this rank's part of it: sum it over them.

    Shapes: hidden [N, H], weight [V/t, H], labels int64 [N], mask fp32 [N] -> fp32 scalar
    Memory: chunk * V/t logits, and the gradients of hidden and (fp32) of weight
    """
    options = {
        "chunk": chunk,
        "vocab_size": vocab_size,
        "first": first,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "reduce": reduce,
    }
    return _LinearCrossEntropy.apply(hidden, weight, labels, mask, options)
