"""How much better each completion is than what was to be expected of its prompt."""

from __future__ import annotations

import numpy as np

from megalm.config.policy import PolicyConfig

STD_FLOOR = 1e-4
"""Added to a group's deviation, as in TRL's and verl's GRPO."""


def compute_advantages(rewards: np.ndarray, counted: np.ndarray, policy: PolicyConfig) -> np.ndarray:
    """Advantages within each group; 0 for what does not count, and in groups with fewer than two that do.

    Shapes: rewards fp64 [groups, G], counted bool [groups, G] -> fp64 [groups, G]
    """
    found = np.zeros_like(rewards)
    for group, (values, valid) in enumerate(zip(rewards, counted, strict=True)):
        count = int(valid.sum())
        if count < 2:
            continue
        own = values[valid]
        if policy.advantage == "leave_one_out":
            others = (own.sum() - own) / (count - 1)
            found[group, valid] = own - others
            continue
        centered = own - own.mean()
        found[group, valid] = (
            centered / (own.std(ddof=1) + STD_FLOOR) if policy.advantage == "standardized" else centered
        )
    return found
