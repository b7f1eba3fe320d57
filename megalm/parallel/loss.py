"""Cross-entropy over logits that are split over the tensor axis: the logits are never gathered."""

from __future__ import annotations

from torch import Tensor

from megalm import ops
from megalm.parallel import collectives
from megalm.parallel.mesh import Axis


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
    Comm:   forward all-reduce of [S, B] (max) and of [3, S, B] (sum), fp32; backward none
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
