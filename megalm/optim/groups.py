"""Which parameters are updated alike: by the role that their layer gave them."""

from __future__ import annotations

from megalm.config.optim import OptimConfig
from megalm.parallel.slices import Role, Slice

NEVER_DECAYED = frozenset({Role.EMBEDDING, Role.NORM, Role.BIAS})
"""Pulling these towards zero holds nothing in bounds: a norm undoes the size of what follows it, and most rows of a table
get no gradient in a step, but would get the decay."""


def decay_of(slice_: Slice, optim: OptimConfig) -> float:
    """The weight decay of a parameter."""
    return 0.0 if slice_.role in NEVER_DECAYED else optim.weight_decay
