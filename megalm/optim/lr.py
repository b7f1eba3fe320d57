"""The learning rate as a function of the step."""

import math
from collections.abc import Sequence
from dataclasses import replace

from megalm.config import OptimConfig
from megalm.config.phases import Span


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


def phased_learning_rate(config: OptimConfig, spans: Sequence[Span], step: int, total_steps: int) -> float:
    """Learning rate of update number `step` in a run of phases; without any, that of `learning_rate`.

    A phase without a schedule of its own is part of the run's course, which is laid over the whole curriculum. One with
    a schedule goes from its `lr`, or from where the phase before ended, to its `min_lr` at its last update; `warmup_steps`
    lead linearly from where the phase before ended to `lr`.
    """
    span = next((span for span in spans if span.first_step <= step < span.end_step), None)
    if spans:
        total_steps = spans[-1].end_step
    if span is None or span.phase.schedule is None:
        return learning_rate(config, step, total_steps)
    first = span.first_step
    before = phased_learning_rate(config, spans, first - 1, total_steps) if first else None
    lowest = config.min_lr if span.phase.min_lr is None else span.phase.min_lr
    peak = span.phase.lr if span.phase.lr is not None else config.lr if before is None else before
    warmup = min(span.phase.warmup_steps, span.end_step - first)
    if step - first < warmup:
        start = before or 0.0
        return start + (peak - start) * (step - first + 1) / (warmup + 1)
    own = replace(config, lr=peak, min_lr=lowest, warmup_steps=0, schedule=span.phase.schedule)
    return learning_rate(own, step - first - warmup, span.end_step - first - warmup)
