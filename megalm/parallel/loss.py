"""Cross-entropy over logits that are split over the tensor axis: the logits are never gathered."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalm import ops
from megalm.parallel import collectives
from megalm.parallel.mesh import Axis
from megalm.parallel.weight_gradient import deliver_ready_gradient


def vocabulary_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    axis: Axis,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Loss of each position, fp32: log Z - logit of the label, + z_loss * log^2 Z.

    Columns past `vocab_size` (padding) do not count. A label outside [0, vocab_size) gives loss 0 and no gradient.
    inplace_backward: the gradient is written over the logits, which nothing else may read afterwards.

    Shapes: logits [S, B, ceil(V/t)], labels [S, B] -> [S, B]
    Comm:   forward all-reduce of [S, B] (max) and of [2, S, B] (sum), fp32; backward none
    Source: Shoeybi et al. 2019 (arXiv:1909.08053), sec. 3; z-loss: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311),
            sec. 5
    """
    return ops.cross_entropy(
        logits,
        labels,
        vocab_size=vocab_size,
        first=axis.rank * logits.shape[-1],
        z_loss=z_loss,
        reduce=None if axis.size == 1 else lambda tensor, operation: collectives.all_reduce(tensor, axis, operation),
        inplace_backward=inplace_backward,
    )


class _LinearLoss(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        axis: Axis,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        parts = ops.linear_cross_entropy_parts(
            hidden,
            weight,
            labels,
            mask,
            first=axis.rank * weight.shape[0],
            reduce=None if axis.size == 1 else lambda tensor, name: collectives.all_reduce(tensor, axis, name),
            want_hidden=ctx.needs_input_grad[0],
            want_weight=ctx.needs_input_grad[1],
            **options,
        )
        # The parameter itself: its sink is found through it.
        ctx.weight, ctx.dhidden, ctx.dweight = weight, parts.dhidden, parts.dweight
        ctx.mark_non_differentiable(parts.losses)
        return parts.total, parts.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        dhidden, dweight = ctx.dhidden, ctx.dweight
        ctx.dhidden = ctx.dweight = None
        if dhidden is not None:
            dhidden.mul_(grad)
        if dweight is not None:
            dweight = deliver_ready_gradient(ctx.weight, dweight, grad)
        return dhidden, dweight, None, None, None, None


def vocabulary_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    axis: Axis,
    *,
    sequence_parallel: bool,
    vocab_size: int,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of mask * loss, mask * loss of each position) of hidden's logits, which are never all held.

    The loss is that of `vocabulary_parallel_cross_entropy(column_parallel(hidden, weight))`; `chunk` positions at a
    time, forward and backward together, so that backward has only the factor left to apply. One backward pass, through
    the sum alone.

    Shapes: hidden [S, B, H], or [S/t, B, H] with sequence_parallel; weight [V/t, H]; labels, mask [S, B]
            -> fp32 scalar, fp32 [S, B]
    Comm:   forward for each chunk all-reduce of [chunk] (max) and [2, chunk] (sum), fp32; backward all-reduce(S); with
            sequence_parallel forward all-gather(S) and backward reduce-scatter(S)
    Source: as `vocabulary_parallel_cross_entropy`; in chunks: Wijmans et al. 2024 (arXiv:2411.09009), Hsu et al. 2024
            (Liger Kernel, arXiv:2410.10989)
    """
    sequence = sequence_parallel and axis.size > 1
    whole = collectives.gather(hidden, axis) if sequence else collectives.copy(hidden, axis)
    options = {"chunk": chunk, "vocab_size": vocab_size, "z_loss": z_loss}
    total, losses = _LinearLoss.apply(
        whole.flatten(0, 1),
        weight,
        labels.reshape(-1),
        None if mask is None else mask.reshape(-1),
        axis,
        options,
    )
    return total, losses.view(labels.shape)
