"""The learning rate as a function of the step."""

import math

from megalm.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of update number `step` (counted from 0) in a run of `total_steps`.

    Linear warm-up to `lr`, reached at update `warmup_steps`; then by `schedule` down to `min_lr` at the last update:
    cosine (Loshchilov & Hutter 2017), linear, wsd (flat, then linear over the last `decay_fraction` of the run; Hu et al.
    2024), or constant.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    span = config.lr - config.min_lr
    if config.schedule == "cosine":
        return config.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "linear":
        return config.lr - span * min(1.0, progress)
    if config.schedule == "wsd":
        start = total_steps - max(1, round(config.decay_fraction * total_steps))
        return config.lr - span * min(1.0, max(0, step - start + 1) / max(1, total_steps - start))
    return config.lr
