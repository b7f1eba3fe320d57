"""What an optimizer keeps beside the states of its rules, the same however these are sharded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from megalm.config.optim import OptimConfig
from megalm.optim.moments import Rewarming
from megalm.optim.stretches import Part
from megalm.optim.tensor_rules import TensorRules
from megalm.parallel.mesh import Mesh


class Optimizer:
    """Step count, clipping and rules for single tensors; a subclass holds the flat buffers."""

    def __init__(self, optim: OptimConfig, mesh: Mesh) -> None:
        self.optim, self.mesh = optim, mesh
        self.step_count = 0
        """Updates since the states started."""
        self.last_scale = 1.0
        """What the gradients of the last update were multiplied by."""
        self.rules: TensorRules
        self.rewarming = Rewarming(optim)

    def parts(self) -> list[Part]:
        """The flat buffers with the global tensors in them."""
        raise NotImplementedError

    def copy_from_replicas(self, odd: Collection[int]) -> None:
        """Have these ranks (of the world) take weights and states from ranks that hold the same and are not among them."""
        raise NotImplementedError

    def clip_factor(self, grad_norm: float) -> float:
        """What the gradients of this update are multiplied by to bound them: call it once for each update that is made."""
        return self.rules.clip.factor(grad_norm)

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Start all states anew, and with them bias correction and the learning rate's return (see `lr_factor`)."""
        for part in self.parts():
            for state in part.state.values():
                state.zero_()
        self.step_count = 0
        self.rewarming.begin()

    def lr_factor(self) -> float:
        """Factor on the scheduled learning rate of the next update: below 1 only after the moments started anew."""
        return self.rewarming.factor(self.step_count)

    def state(self) -> dict[str, Any]:
        """What the boxes do not hold, the same on every rank."""
        return {
            "step": self.step_count,
            "scale": self.last_scale,
            "clip": self.rules.clip.state(),
            "resets": self.rewarming.resets,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.step_count = int(state["step"])
        self.last_scale = float(state.get("scale", 1.0))
        self.rules.clip.load_state(state.get("clip", {}))
        self.rewarming.resets = int(state.get("resets", 0))
