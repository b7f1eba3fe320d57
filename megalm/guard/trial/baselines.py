"""Published rules against loss spikes, re-stated from their descriptions, to measure the guard's detector beside them.

Each judges one step at a time: `observe(loss, grad_norm) -> "none" | "skip" | "rollback"`, where rollback stands for
whatever the rule does about a run that is lost (stop, restart, ask a person).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from megalm.guard.detect import SpikeDetector, adapt_to_stride
from megalm.guard.policy import choose_unprobed_action


class Rule(Protocol):
    """One step at a time."""

    def observe(self, loss: float, grad_norm: float | None = None) -> str:
        """none, skip or rollback."""
        ...


class Guard:
    """This project's detector, with no probe to ask."""

    def __init__(self, stride: float = 1):
        self.detector, self.step = SpikeDetector(adapt_to_stride(stride)), 0

    def observe(self, loss: float, grad_norm: float | None = None) -> str:
        self.step += 1
        seen = self.detector.observe(self.step, loss)
        return choose_unprobed_action(seen.kind, seen.lasting)


class TenTimesTheStart:
    """Megatron-LM's check for spiky loss: ten times the largest of the first hundred losses, or not finite."""

    def __init__(self) -> None:
        self.seen, self.largest = 0, 0.0

    def observe(self, loss: float, grad_norm: float | None = None) -> str:
        if not math.isfinite(loss):
            return "rollback"
        self.seen += 1
        if self.seen <= 100:
            self.largest = max(self.largest, loss)
            return "none"
        return "rollback" if loss >= 10 * self.largest else "none"


class TwiceTheMean:
    """llm-foundry's loss spike callback: five losses in a row of twice the running mean, or half of a window above a cap."""

    def __init__(self, run_length: int = 2000, cap: float = 10.0):
        self.window: deque[float] = deque(maxlen=max(100, run_length // 20))
        self.row, self.cap, self.seen = 0, cap, 0

    def observe(self, loss: float, grad_norm: float | None = None) -> str:
        full = len(self.window) == self.window.maxlen
        mean = sum(self.window) / len(self.window) if self.window else math.inf
        self.row = self.row + 1 if full and loss >= 2 * mean else 0
        self.window.append(loss)
        self.seen += 1
        high = sum(x > self.cap for x in self.window)
        if self.row >= 5 or full and self.seen > 2 * len(self.window) and high > len(self.window) / 2:
            self.row = 0
            return "rollback"
        return "none"


class SixDeviations:
    """OLMo-core's and llm.c's outlier rule: refuse what is six standard deviations above the last 128 losses' mean."""

    def __init__(self, window: int = 128, deviations: float = 6.0):
        self.window: deque[float] = deque(maxlen=window)
        self.deviations = deviations

    def observe(self, loss: float, grad_norm: float | None = None) -> str:
        n = len(self.window)
        accepted = True
        if n >= (self.window.maxlen or 0) // 2:
            mean = sum(self.window) / n
            spread = math.sqrt(sum((x - mean) ** 2 for x in self.window) / (n - 1)) if n > 1 else 0.0
            accepted = loss - mean <= self.deviations * spread  # false for NaN, and for all that follow one
        self.window.append(loss)
        return "none" if accepted else "skip"


class GradientClip:
    """ZClip: a gradient norm 2.5 deviations above its moving average is clipped; here, a clipped step counts as skipped."""

    def __init__(self, decay: float = 0.97, warmup: int = 25, limit: float = 2.5):
        self.decay, self.warmup, self.limit = decay, warmup, limit
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def observe(self, loss: float, grad_norm: float | None = None) -> str:
        if grad_norm is None or not math.isfinite(grad_norm):
            return "none"
        if len(self.first) < self.warmup:
            self.first.append(grad_norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / len(self.first)
            return "none"
        spread = math.sqrt(self.variance) or 1e-6
        z = (grad_norm - self.mean) / spread
        clipped = self.mean + self.limit * spread / (z / self.limit) if z > self.limit else grad_norm
        self.mean = self.decay * self.mean + (1 - self.decay) * clipped
        self.variance = self.decay * self.variance + (1 - self.decay) * (clipped - self.mean) ** 2
        return "skip" if z > self.limit else "none"


RULES: dict[str, Callable[[], Rule]] = {
    "megalm guard": Guard,
    "Megatron-LM 10x": TenTimesTheStart,
    "llm-foundry 2x": TwiceTheMean,
    "OLMo-core 6 sd": SixDeviations,
    "ZClip (norm)": GradientClip,
}
