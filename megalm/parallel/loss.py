"""Cross-entropy over logits that are split over the tensor axis: the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.parallel import collectives
from megalm.parallel.mesh import Axis

# Logits handled at a time in fp32: bounds the temporary memory and stays near a core's cache.
_BLOCK = 1 << 19


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits and log Z of each position; the softmax is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: Axis, vocab_size: int, z_loss: float) -> Tensor:
        width = logits.shape[-1]
        start = axis.rank * width
        real = max(0, min(width, vocab_size - start))
        flat, target = logits.reshape(-1, width), labels.reshape(-1)
        count = flat.shape[0]
        peak = torch.full((count,), -torch.inf, dtype=torch.float32, device=logits.device)
        if real:
            torch.amax(flat[:, :real].float() if flat.dtype != torch.float32 else flat[:, :real], 1, out=peak)
        collectives.all_reduce(peak, axis, "max")
        # Row 0: sum of exponentials; row 1: the label's logit, from the one rank that holds it.
        sums = torch.zeros(2, count, dtype=torch.float32, device=logits.device)
        local = target - start
        mine = (local >= 0) & (local < real)
        if real:
            rows = max(1, _BLOCK // width)
            for first in range(0, count, rows):
                block = slice(first, first + rows)
                shifted = flat[block, :real].float() - peak[block, None]
                torch.sum(shifted.exp_(), 1, out=sums[0, block])
            picked = flat.gather(1, local.clamp(0, real - 1)[:, None])[:, 0].float()
            sums[1] = torch.where(mine, picked, 0.0)
        collectives.all_reduce(sums, axis)
        log_z = sums[0].log_() + peak
        loss = log_z - sums[1]
        if z_loss:
            loss += z_loss * log_z.square()
        counted = (target >= 0) & (target < vocab_size)
        loss = torch.where(counted, loss, 0.0)
        ctx.save_for_backward(logits, local, mine, log_z, counted)
        ctx.real, ctx.z_loss = real, z_loss
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, local, mine, log_z, counted = ctx.saved_tensors
        width, real = logits.shape[-1], ctx.real
        flat = logits.reshape(-1, width)
        weight = torch.where(counted, grad.reshape(-1).float(), 0.0)
        scale = weight * (1.0 + 2.0 * ctx.z_loss * log_z) if ctx.z_loss else weight
        result = torch.empty_like(flat)
        result[:, real:] = 0.0
        rows = max(1, _BLOCK // width)
        if real:
            for first in range(0, flat.shape[0], rows):
                block = slice(first, first + rows)
                softmax = (flat[block, :real].float() - log_z[block, None]).exp_()
                softmax.mul_(scale[block, None])
                column = local[block].clamp(0, real - 1)[:, None]
                softmax.scatter_add_(1, column, torch.where(mine[block], -weight[block], 0.0)[:, None])
                result[block, :real] = softmax
        return result.view(logits.shape), None, None, None, None


def vocabulary_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, axis: Axis, *, vocab_size: int, z_loss: float = 0.0
) -> Tensor:
    """Loss of each position, fp32: log Z - logit of the label, + z_loss * log^2 Z.

    Columns past `vocab_size` (padding) do not count. A label outside [0, vocab_size) gives loss 0 and no gradient.

    Shapes: logits [S, B, ceil(V/t)], labels [S, B] -> [S, B]
    Comm:   forward all-reduce of [S, B] (max) and of [2, S, B] (sum); backward none
    Source: Shoeybi et al. 2019 (arXiv:1909.08053), sec. 3; z-loss: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311),
            sec. 5
    """
    return _CrossEntropy.apply(logits, labels, axis, vocab_size, z_loss)
