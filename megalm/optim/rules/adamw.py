"""AdamW: moving averages of the gradient and of its square, and decoupled decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megalm.config.optim import STATES
from megalm.ops import adamw_, update_squares
from megalm.optim.rules.rule import Rule, Update
from megalm.optim.stretches import Part


class AdamW(Rule):
    """m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  direction = m' / (sqrt(v') + eps), m' and v' corrected for
    their start at zero. The step is one pass of a kernel.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101)
    """

    states = STATES["adamw"]

    def direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        beta1, beta2 = self.optim.betas
        first = state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        second = state["exp_avg_sq"].lerp_(gradient.square(), 1.0 - beta2)
        return first / (second / (1.0 - beta2**step)).sqrt_().add_(self.optim.eps) / (1.0 - beta1**step)

    def step(self, part: Part, update: Update) -> None:
        beta1, beta2 = self.optim.betas
        adamw_(
            part.master,
            part.gradient(),
            part.state["exp_avg"],
            part.state["exp_avg_sq"],
            lr=update.lr * part.group.rate,
            beta1=beta1,
            beta2=beta2,
            eps=self.optim.eps,
            weight_decay=part.group.decay,
            step=update.step,
            grad_scale=update.grad_scale,
            out=part.out,
            segments=update.segments,
        )

    def update_squares(
        self, gradient: Tensor, state: Mapping[str, Tensor], lengths: Sequence[int], step: int, scale: float
    ) -> Tensor:
        beta2, eps = self.optim.betas[1], self.optim.eps
        return update_squares(
            gradient, state["exp_avg_sq"], list(lengths), beta2=beta2, eps=eps, step=step, grad_scale=scale
        )
