"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megalm.config.optim import STATES
from megalm.optim.rules.rule import Rule


class SGD(Rule):
    """g = gradient + decay w;  b = momentum b + g;  direction = b, or g + momentum b (Nesterov): as torch.optim.SGD.

    Source: Sutskever et al. 2013 (On the importance of initialization and momentum in deep learning)
    """

    states = STATES["sgd"]
    coupled_decay = True

    def direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        momentum = self.optim.momentum
        buffer = state["momentum"].mul_(momentum).add_(gradient)
        return gradient + momentum * buffer if self.optim.nesterov else buffer
