"""AdamW over one flat buffer (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> None:
    """One update in place, all tensors flat and fp32. `grad` may be overwritten.

    g = grad * grad_scale;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    step counts from 1. out: where the rounded weights go as well (bf16 parameters).
    """
    inverse: Tensor | None = None
    if isinstance(grad_scale, Tensor):
        inverse = grad_scale.to(device=grad.device, dtype=torch.float32).reciprocal()
    elif grad_scale != 1.0:
        inverse = torch.tensor(1.0 / grad_scale, dtype=torch.float32, device=grad.device)
    torch._fused_adamw_(
        [master],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(step), device=grad.device)],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=inverse,
        found_inf=None,
    )
    if out is not None:
        out.copy_(master)
