"""The learning rate as a function of the step."""

import math
from collections.abc import Sequence
from dataclasses import replace

from megalm.config import OptimConfig
from megalm.config.phases import Span

USUAL_WARMUP = 100
"""Updates of a warm-up that nobody gave a length."""


def count_warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Updates that the learning rate rises over in a run of `total_steps`.

    What is asked for, if the run has updates left for the peak and, unless the schedule is constant, for the end. Otherwise
    a tenth of the run: a short try of a long run's settings then has a course of its own, and not a piece of a rise.
    """
    given = config.warmup_steps
    last = total_steps - (1 if config.schedule == "constant" else 2)
    if given is None and config.schedule == "wsd":
        last = min(last, _decay_start(config, total_steps))
    wanted = USUAL_WARMUP if given is None else given
    return wanted if wanted <= last else max(0, min(last, max(1, total_steps // 10)))


def compute_learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of update number `step` (counted from 0) in a run of `total_steps`.

    Linear warm-up to `lr`, reached at update `count_warmup_steps`; then by `schedule` down to `min_lr` at the last update:
    cosine (Loshchilov & Hutter 2017), linear, wsd (flat, then linear over the last `decay_fraction` of the run, or what the
    warm-up leaves of it; Hu et al. 2024), or constant.
    """
    assert config.min_lr is not None
    warmup = count_warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    span = config.lr - config.min_lr
    if config.schedule == "cosine":
        return config.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "linear":
        return config.lr - span * min(1.0, progress)
    if config.schedule == "wsd":
        start = _decay_start(config, total_steps)
        if start <= warmup:  # the peak is reached, and the decay begins there
            return config.lr - span * min(1.0, progress)
        return config.lr - span * min(1.0, max(0, step - start + 1) / max(1, total_steps - start))
    return config.lr


def _decay_start(config: OptimConfig, total_steps: int) -> int:
    """wsd: the first update below the peak."""
    return total_steps - max(1, round(config.decay_fraction * total_steps))


def compute_phased_learning_rate(config: OptimConfig, spans: Sequence[Span], step: int, total_steps: int) -> float:
    """Learning rate of update number `step` in a run of phases; without any, that of `compute_learning_rate`.

    A phase without a schedule of its own is part of the run's course, which is laid over the whole curriculum. One with
    a schedule goes from its `lr`, or from where the phase before ended, to its `min_lr` at its last update; `count_warmup_steps`
    lead linearly from where the phase before ended to `lr`.
    """
    span = next((span for span in spans if span.first_step <= step < span.end_step), None)
    if spans:
        total_steps = spans[-1].end_step
    if span is None or span.phase.schedule is None:
        return compute_learning_rate(config, step, total_steps)
    first = span.first_step
    before = compute_phased_learning_rate(config, spans, first - 1, total_steps) if first else None
    peak = span.phase.lr if span.phase.lr is not None else config.lr if before is None else before
    assert config.min_lr is not None
    lowest = span.phase.min_lr
    if lowest is None:  # a phase that begins below the run's end ends at the same share of its own peak
        lowest = config.min_lr if config.min_lr <= peak else peak * config.min_lr / config.lr
    warmup = span.phase.warmup_steps
    if step - first < warmup:
        start = before or 0.0
        return start + (peak - start) * (step - first + 1) / (warmup + 1)
    own = replace(config, lr=peak, min_lr=lowest, warmup_steps=0, schedule=span.phase.schedule)
    return compute_learning_rate(own, step - first - warmup, span.end_step - first - warmup)
