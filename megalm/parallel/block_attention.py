"""Attention of one block of queries and one of keys, with its log-sum-exp: what context parallelism puts together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Plain:
    """Attention of query and key blocks with log-sum-exp, in matrix products that run anywhere; it alone caps scores.

    Shapes: q [B, h, Q, d], k and v [B, h, K, d], bias [1 or B, 1 or h, Q, K] or None -> out [B, h, Q, d], lse [B, h, Q] fp32
    """

    def __init__(self, softcap: float | None = None) -> None:
        self.softcap = softcap

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores, _ = self._scores(q, k, causal, bias, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp_().to(v.dtype) @ v, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, bent = self._scores(q, k, causal, bias, scale)
        weights = (scores - lse.unsqueeze(-1)).exp_()
        grad_v = weights.to(grad.dtype).transpose(-1, -2) @ grad
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = weights.mul_((grad @ v.transpose(-1, -2)).float() - inner).mul_(scale)
        if bent is not None:
            grad_scores = grad_scores * (1 - bent.square())
        grad_scores = grad_scores.to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v

    def _scores(
        self, q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Scores, and where they are capped the tanh in them."""
        scores, bent = (q @ k.transpose(-1, -2)).float().mul_(scale), None
        if self.softcap is not None:
            bent = scores.div_(self.softcap).tanh_()
            scores = bent * self.softcap
        if bias is not None:
            scores += bias
        if causal:
            hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(hidden, -torch.inf)
        return scores, bent


class CpuFlash:
    """The same through torch's CPU flash attention: no score matrix in memory."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_mask(q, k, bias), scale=scale
        )

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_mask(q, k, bias), scale=scale
        )


def _mask(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


class CudaFlash:
    """The same through torch's flash attention for GPUs; bias must be None."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # a random state, and nothing is dropped
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused[:0], scale=scale
        )


def choose_kernel(q: Tensor, biased: bool, softcap: float | None) -> Any:
    """The fastest that serves: 16-bit heads of a size that flash attention knows, without bias or cap, on a GPU."""
    if softcap is not None:
        return Plain(softcap)
    if q.device.type == "cpu":
        return CpuFlash if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward") else Plain()
    flash = q.device.type == "cuda" and not torch.version.hip and q.dtype in (torch.float16, torch.bfloat16)
    return CudaFlash if flash and not biased and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 else Plain()
