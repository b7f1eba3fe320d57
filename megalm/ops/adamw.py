"""AdamW over one flat buffer, in one pass. Contract: csrc/adamw/op.h."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, address, loaded_library, place, require, use_native


@torch.no_grad()
def adamw_reference_(
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
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    def keep(old: Tensor, new: Tensor) -> None:
        old.copy_(new if skip is None else torch.where(skip != 0, old, new.to(old.dtype)))

    g = grad * grad_scale
    first = exp_avg * beta1 + (1.0 - beta1) * g
    second = exp_avg_sq * beta2 + (1.0 - beta2) * g * g
    denominator = (second / (1.0 - beta2**step)).sqrt_().add_(eps)
    updated = master * (1.0 - lr * weight_decay) - lr / (1.0 - beta1**step) * first / denominator
    for old, new in ((exp_avg, first), (exp_avg_sq, second), (master, updated)):
        keep(old, new)
    if out is not None:
        keep(out, updated)


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
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """One update in place; grad is only read.

    g = grad * grad_scale;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    step counts from 1. grad_scale: a number, or a one-element tensor, which is read on its device.
    skip: a one-element tensor; nothing is written where it is not 0. out: where the rounded weights go as well.

    Shapes: master, grad, exp_avg, exp_avg_sq fp32 [N]; out [N] fp32, bf16 or fp16
    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101)
    """
    require(step >= 1, f"adamw_: step={step}; it counts from 1.")
    state = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in (*state.items(), ("out", out)):
        require(
            tensor is None or tensor.shape == master.shape,
            f"adamw_: {name} has another shape than master, {tuple(master.shape)}.",
        )
    tensors = [*state.values(), *([] if out is None else [out])]
    fits = all(t.is_contiguous() for t in tensors) and master.dtype == torch.float32
    if out is not None:
        fits = fits and use_native("adamw_", out=out) and out.device == master.device
    if not use_native("adamw_", **state) or not fits:
        adamw_reference_(
            master,
            grad,
            exp_avg,
            exp_avg_sq,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            grad_scale=grad_scale,
            skip=skip,
            out=out,
        )
        return
    scale = None
    if isinstance(grad_scale, Tensor):
        scale = grad_scale.to(device=master.device, dtype=torch.float32)
    if skip is not None:
        skip = skip.to(device=master.device, dtype=torch.float32)
    loaded_library().adamw(
        *place(master),
        master.numel(),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        1.0 - beta1**step,
        1.0 - beta2**step,
        1.0 if scale is not None else float(grad_scale),
        address(scale),
        address(skip),
        address(master),
        address(grad),
        address(exp_avg),
        address(exp_avg_sq),
        0 if out is None else DTYPE_CODES[out.dtype],
        address(out),
    )
