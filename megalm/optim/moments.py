"""When Adam's moments start anew, and how the learning rate comes back after it."""

from __future__ import annotations

import math

from megalm.config.optim import OptimConfig


class Rewarming:
    """Both moments set to zero, together with the count of updates that corrects their bias, forget what a spike left in
    them; the second moment alone would be a disaster (the next update is then divided by almost nothing).

    Source: Huang et al. 2025 (SPAM, arXiv:2501.06842): reset every 500 updates, cosine return over 150
    """

    def __init__(self, optim: OptimConfig) -> None:
        assert optim.reset_warmup_steps is not None
        self.every, self.steps = optim.reset_every, optim.reset_warmup_steps
        self.resets = 0

    def due(self, step_count: int) -> bool:
        """Whether so many updates since the last start are enough."""
        return self.every > 0 and step_count >= self.every

    def begin(self) -> None:
        """The moments were started anew."""
        self.resets += 1

    def factor(self, step_count: int) -> float:
        """Of the learning rate, for the update after `step_count` updates since the last start."""
        if not self.resets or step_count >= self.steps:
            return 1.0
        return 0.5 * (1.0 - math.cos(math.pi * (step_count + 1) / (self.steps + 1)))
