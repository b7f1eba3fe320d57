"""What an update rule is: the state that it keeps for every weight, and the update that follows from a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalm.config.optim import OptimConfig
from megalm.ops import Segments
from megalm.optim.stretches import Part


@dataclass(frozen=True)
class Update:
    """How one update is made.

    step: its number since the states started, from 1. grad_scale: what gradients are multiplied by. segments: factors of the
    learning rate by tensor (update clipping).
    """

    lr: float
    step: int
    grad_scale: float | Tensor = 1.0
    segments: Segments | None = None


class Rule:
    """w = w (1 - lr decay) - lr direction(gradient, states); a subclass says its states and its direction.

    `direction` is called with flat buffers, as they come. A rule that needs whole tensors is a `WholeMatrixRule`.
    """

    states: ClassVar[tuple[str, ...]]
    """Names of the fp32 buffers of the weights' size; in checkpoints `optimizer.STATE.NAME`. All begin with zeros."""
    whole_matrices: ClassVar[bool] = False
    coupled_decay: ClassVar[bool] = False
    """Whether decay is a part of the gradient, and goes through the states."""

    def __init__(self, optim: OptimConfig) -> None:
        self.optim = optim

    def direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        """Take the gradient into the states, in place, and return the update at learning rate 1 (to be subtracted).

        Zeros must give zeros: padding lies between tensors. The gradient must not be written to.
        """
        raise NotImplementedError

    def step(self, part: Part, update: Update) -> None:
        """Update a part's masters, and the rounded weights where it has them."""
        gradient = part.gradient() * update.grad_scale
        if self.coupled_decay:
            gradient = gradient + part.group.decay * part.master
        self.move(part, self.direction(gradient, part.state, update.step), update.lr)

    def move(self, part: Part, direction: Tensor, lr: float) -> None:
        """Move a part's masters against the direction, and round them where there are rounded weights."""
        lr, decay = lr * part.group.rate, part.group.decay
        if not self.coupled_decay:
            part.master.mul_(1.0 - lr * decay)
        part.master.sub_(direction, alpha=lr)
        if part.out is not None:
            part.out.copy_(part.master)

    def sample(self, parts: Sequence[Part], places: Sequence[Tensor], step: int, scale: float) -> Tensor:
        """What the next update is at some places of parts of this rule, at learning rate 1 and without decay; nothing is
        changed. Shapes: places [n of each part] -> [sum of n]"""
        pairs = list(zip(parts, places, strict=True))
        gradient = torch.cat([part.gradient()[where] for part, where in pairs]) * scale
        state = {name: torch.cat([part.state[name][where] for part, where in pairs]) for name in self.states}
        return self.direction(gradient, state, step)

    def update_squares(
        self, gradient: Tensor, state: Mapping[str, Tensor], lengths: Sequence[int], step: int, scale: float
    ) -> Tensor:
        """Sums over runs of elements of g^2 / v, for update clipping; only rules with a second moment can judge by it
        (`READS` in megalm.config.optim says which)."""
        raise NotImplementedError
