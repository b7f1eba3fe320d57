"""The spike detector: one observation a step in, one judgement out. Pure: numbers only, no torch, no clock, no randomness.

What it looks at is x = ln(loss) (and ln of the gradient norm), against a baseline that only learns from steps it accepted:

    m, s = median and 1.4826 MAD of the last 128 accepted x, after removing a falling trend in ln(step)
    z    = (x - m) / s

    gate        z > 6 (or a gradient norm z > 8, or one data rank far above the others): this single step is refused
    fall        the loss drops at once to below about a half: this step is refused, too. A loss that stays down, or that
                went down step by step, has improved: its level becomes the baseline, and nothing is ever taken back
    update      the coming update is several times larger than usual, and the gradient does not explain it: the
                optimizer's state or the learning rate is wrong
    shift       S = max(0, S + clip(z, -5, 5) - k): a cumulative sum; S > h means that the level has moved for good
    nonfinite   refused at once; four in a row mean that the weights themselves are gone

Every constant's reason stands at its definition in `megalm.config.guard.DetectorConfig`.
Sources: Page 1954 (CUSUM); Hampel 1974 (MAD); the constants were chosen on real loss curves (docs/guard.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.guard import DetectorConfig


def adapt_to_stride(stride: float) -> DetectorConfig:
    """The detector's constants for a curve that holds only every `stride`-th step.

    There a sample stands for many steps: three in a row are already a lasting shift.
    """
    if stride < 5:
        return DetectorConfig()
    return DetectorConfig(window=64, min_window=24, alarm=16.0, persistence=3, healing_limit=3, freeze_limit=64)


@dataclass(frozen=True)
class Observation:
    """What the detector says of one step."""

    step: int
    kind: str
    """none | transient | update | shift | nonfinite"""
    z: float
    """Standard score of ln(loss); 0 while the baseline is not known. Infinite for a non-finite loss."""
    gradient_z: float = 0.0
    excess: float = 0.0
    """ln(loss) above its baseline."""
    expected: float = math.nan
    """The loss that the baseline expected."""
    onset: int = -1
    """First step of the episode that this step belongs to (-1: none)."""
    lasting: bool = False
    """The state is damaged (a shift, or non-finite steps in a row), not only this step."""
    slow: bool = False
    """The loss rose slowly (over more than 10 samples), which skipping data alone has not been seen to cure."""
    why: tuple[str, ...] = ()
    """What was out of line: loss, fall (a loss that is far too low), gradient, update, spread."""


class Baseline:
    """Median and MAD of the last `window` accepted values, with a falling trend in ln(step) removed."""

    def __init__(self, window: int, minimum: int, floor: float, *, trend: bool = True):
        self.window, self.minimum, self.floor, self.trend = window, minimum, floor, trend
        self.values = np.zeros(window)
        self.clock = np.zeros(window)
        self.count = 0
        self._fit: tuple[float, float, float, float, float] | None = None

    @property
    def ready(self) -> bool:
        return self.count >= self.minimum

    def add(self, clock: float, value: float) -> None:
        n = self.count
        if n < self.window:
            self.values[n], self.clock[n] = value, clock
            self.count = n + 1
        else:
            self.values[:-1] = self.values[1:]
            self.clock[:-1] = self.clock[1:]
            self.values[-1], self.clock[-1] = value, clock
        self._fit = None

    def clear(self) -> None:
        self.count = 0
        self._fit = None

    def predict(self, clock: float) -> tuple[float, float, float]:
        """(m, s below, s above) at that time."""
        if self._fit is None:
            self._fit = self._estimate()
        level, slope, least, below, above = self._fit
        return max(least, level + slope * clock), below, above

    def _estimate(self) -> tuple[float, float, float, float, float]:
        n = self.count
        values, half, slope, least = self.values[:n], n // 2, 0.0, -math.inf
        level = _median(values)
        scale = _spread(values, level)
        if self.trend:
            # Never a rising trend (a slow rise is what we are here to see), nor one that the noise could feign;
            # and as losses flatten out, never a prediction below what was last reached.
            fall = _median(values[n - half :]) - _median(values[:half])
            apart = float(self.clock[n - half : n].mean() - self.clock[:half].mean())
            if fall < -0.5 * scale and apart > 0:
                slope = fall / apart
                least = _median(values[-max(16, n // 4) :]) if n >= 16 else -math.inf
                values = values - slope * self.clock[:n]
                level = _median(values)
                scale = _spread(values, level)
        below = max(self.floor, scale)
        tail = float(np.partition(values, n - 1 - n // 10)[n - 1 - n // 10]) - level
        return level, slope, least, below, max(below, tail / 1.2816)

    def state_dict(self) -> dict:
        n = self.count
        return {"values": self.values[:n].tolist(), "clock": self.clock[:n].tolist()}

    def load_state_dict(self, state: dict) -> None:
        values = state["values"][-self.window :]
        self.count = len(values)
        self.values[: self.count] = values
        self.clock[: self.count] = state["clock"][-self.window :]
        self._fit = None


@dataclass(frozen=True)
class _Sizes:
    """Logarithms of what is positive; None where there is nothing to judge."""

    gradient: float | None
    update: float | None
    spread: float | None

    @staticmethod
    def of(grad_norm: float | None, update_size: float | None, loss_spread: float | None) -> _Sizes:
        spread = None if loss_spread is None else max(loss_spread, 0.0) + 0.01
        return _Sizes(_log(grad_norm), _log(update_size), _log(spread))


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and 0.0 < value < math.inf else None


def _score(baseline: Baseline, clock: float, value: float | None) -> float:
    """z of a value; 0 where it or the baseline is not known."""
    if value is None or not baseline.ready:
        return 0.0
    m, _, above = baseline.predict(clock)
    return (value - m) / above


def _median(values: np.ndarray) -> float:
    """np.median is ten times slower on arrays this small."""
    n = len(values)
    k = n // 2
    if n % 2:
        return float(np.partition(values, k)[k])
    part = np.partition(values, (k - 1, k))
    return float(0.5 * (part[k - 1] + part[k]))


def _spread(values: np.ndarray, level: float) -> float:
    return 1.4826 * _median(np.abs(values - level))


class SpikeDetector:
    """Feed it every step with `observe`; its state is small and JSON-able."""

    def __init__(self, config: DetectorConfig | None = None):
        self.config = c = config or DetectorConfig()
        self.loss = Baseline(c.window, c.min_window, c.scale_floor)
        self.gradient = Baseline(c.window, c.min_window, 0.02, trend=False)
        self.update = Baseline(c.window, c.min_window, 0.05, trend=False)
        self.spread = Baseline(c.window, c.min_window, 0.05, trend=False)
        self.sum = 0.0
        self.total = 0.0
        self.recent: list[float] = []
        self.excesses: list[float] = []
        self.onset = -1
        self.length = 0
        self.frozen = 0
        self.run = 0
        self.calm = 0
        self.run_onset = -1
        self.fallen: list[list[float]] = []
        """[clock, ln(loss)] of the samples in a row that are far below the baseline."""
        self.sudden = False
        """Whether these began with a drop from one sample to the next."""
        self.previous: float | None = None
        """ln(loss) of the sample before."""
        self.nonfinite = 0
        self.onset_nonfinite = -1
        self.raised = False
        self.settled: list[float] = []
        self.held: list[list[float]] = []

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float | None = None,
        nonfinite: float = 0,
        *,
        update_size: float | None = None,
        loss_spread: float | None = None,
    ) -> Observation:
        """Judge one step, before its update is applied; what is None is not judged."""
        bad_gradient = grad_norm is not None and not math.isfinite(grad_norm)
        if not math.isfinite(loss) or nonfinite or bad_gradient:
            self.nonfinite += 1
            if self.nonfinite == 1:
                self.onset_nonfinite = step
            lasting = self.nonfinite == self.config.nonfinite_limit
            return Observation(step, "nonfinite", math.inf, onset=self.onset_nonfinite, lasting=lasting)
        self.nonfinite = 0
        return self._judge(step, math.log(max(loss, 1e-9)), _Sizes.of(grad_norm, update_size, loss_spread))

    def _judge(self, step: int, x: float, sizes: _Sizes) -> Observation:
        c = self.config
        clock = math.log(step + 10.0)
        previous, self.previous = self.previous, x
        gradient_z = _score(self.gradient, clock, sizes.gradient)
        why = self._odd_sizes(clock, sizes, gradient_z)
        if not self.loss.ready:
            self.loss.add(clock, x)
            self._learn_sizes(clock, sizes)
            return Observation(step, "none", 0.0, gradient_z)
        m, below, above = self.loss.predict(clock)
        excess = x - m
        z = excess / (above if excess > 0 else below)
        gated = z > c.gate and excess > c.gate_excess
        observed: dict[str, Any] = {
            "z": z,
            "gradient_z": gradient_z,
            "excess": excess,
            "expected": math.exp(m),
        }
        if "update" in why:
            # The state is odd, not this batch: nothing is learned from the step, and the run of outliers is left alone.
            return Observation(step, "update", onset=step, why=("loss", *why) if gated else why, **observed)
        if self.raised:
            return self._wait_out(step, clock, x, z, observed)
        if self._accumulate(step, z, excess):
            onset = self.run_onset if self.run else self.onset
            slow = self.run == 0 and self.length > 10 and self._rose()
            self._reset_sum()
            self.raised, self.settled, self.held = True, [], []
            onset = onset if onset >= 0 else step
            return Observation(step, "shift", onset=onset, lasting=True, slow=slow, why=("loss",), **observed)
        low = z < -c.gate and excess < -c.fall
        self._watch_fall(clock, x, low, previous)
        if not low:
            # Outliers above enter cut to 6 s, so that heavy tails widen `above`; falls enter as they are, but not collapses.
            self._learn(clock, max(min(x, m + c.gate * above), m - c.fall))
        why = ("loss", *why) if gated else ("fall", *why) if low and self.sudden else why
        if not why:
            self._learn_sizes(clock, sizes)
            return Observation(step, "none", **observed)
        return Observation(step, "transient", onset=self.run_onset if self.run else step, why=why, **observed)

    def _odd_sizes(self, clock: float, sizes: _Sizes, gradient_z: float) -> tuple[str, ...]:
        """Which of gradient norm, update and spread are out of line."""
        c, odd = self.config, []
        if gradient_z > c.gradient_gate:
            odd.append("gradient")
        elif sizes.update is not None and self.update.ready:
            usual, _, above = self.update.predict(clock)
            if sizes.update - usual > max(c.update_gate, c.gate * above):
                odd.append("update")
        if _score(self.spread, clock, sizes.spread) > c.gradient_gate and math.exp(sizes.spread or 0.0) > c.spread_gate:
            odd.append("spread")
        return tuple(odd)

    def _accumulate(self, step: int, z: float, excess: float) -> bool:
        """True when the level has moved for good.

        Outliers, and what follows them while z is still high, do not add to the sum: they are counted by their run.
        """
        c = self.config
        if z > c.gate or (self.run and z > c.strong):
            self.run, self.calm = self.run + 1, 0
            if self.run == 1:
                self.run_onset = step
        elif self.run:
            self.calm += 1
            if self.calm == 2:
                self.run = self.calm = 0
        if not self.run:
            before, self.sum = self.sum, max(0.0, self.sum + max(-c.clip, min(c.clip, z)) - c.drift)
            if self.sum > 0.0 and before == 0.0:
                self.onset, self.length, self.total = step, 0, 0.0
        if self.sum == 0.0 and not self.run:
            self._reset_sum()
            return False
        self.length += 1
        self.total += max(-c.clip, min(c.clip, z))
        self.recent = (self.recent + [z])[-2:]
        self.excesses = (self.excesses + [excess])[-64:]
        long_run = self.run >= c.persistence
        if not long_run and (self.sum <= c.alarm or self.length < c.persistence):
            return False
        if min(self.recent) < c.still * self.total / self.length:
            return False
        return not self._healing()

    def _rose(self) -> bool:
        """The loss went up little by little, rather than at once."""
        third = len(self.excesses) // 3
        return sum(self.excesses[:third]) < 0.5 * sum(self.excesses[-third:])

    def _healing(self) -> bool:
        c = self.config
        if self.length > c.persistence + c.healing_limit or len(self.excesses) < 8:
            return False
        now = sum(self.excesses[-3:]) / 3
        then = sum(self.excesses[-8:-5]) / 3
        return now < c.healing * then

    def _watch_fall(self, clock: float, x: float, low: bool, previous: float | None) -> None:
        """A loss that stays far below its baseline has improved (other data, overfitting, grokking): take the level up.

        No damage lowers the loss; what does it for a few steps only is a batch that is too easy.
        """
        if not low:
            self.fallen, self.sudden = [], False
            return
        if not self.fallen:
            self.sudden = previous is not None and x < previous - self.config.fall
        self.fallen.append([clock, x])
        if len(self.fallen) >= self.config.persistence:
            self.held, self.fallen, self.sudden = self.fallen, [], False
            self._adopt()

    def _wait_out(self, step: int, clock: float, x: float, z: float, observed: dict[str, Any]) -> Observation:
        """After an alarm: either the old level comes back (as a rollback makes it), or the new one becomes the baseline."""
        c = self.config
        self.held.append([clock, x])
        self.settled = (self.settled + [z])[-min(8, c.persistence) :]
        if len(self.settled) == min(8, c.persistence) and sum(self.settled) < len(self.settled):
            self.raised, self.held = False, []
        elif len(self.held) >= c.window // 2:
            self._adopt()
        return Observation(step, "none", onset=-1, **observed)

    def _adopt(self) -> None:
        held, self.held, self.raised = self.held, [], False
        self.loss.clear()
        for clock, x in held[-self.config.window // 2 :]:
            self.loss.add(clock, x)
        self._reset_sum()

    def _learn(self, clock: float, winsorised: float) -> None:
        c = self.config
        if self.sum > c.freeze or self.run > 1:
            self.frozen += 1
            self.held = (self.held + [[clock, winsorised]])[-c.window // 2 :]
            if self.frozen > c.freeze_limit:
                self.frozen = 0
                self._adopt()
            return
        self.frozen = 0
        if self.held:
            self.held = []
        self.loss.add(clock, winsorised)

    def _learn_sizes(self, clock: float, sizes: _Sizes) -> None:
        if self.sum > self.config.freeze:
            return
        for baseline, value in (
            (self.gradient, sizes.gradient),
            (self.update, sizes.update),
            (self.spread, sizes.spread),
        ):
            if value is not None:
                baseline.add(clock, value)

    def keep_level(self, onset: int) -> None:
        """A shift was declared, and what made it will be left out: go on judging by the level before it."""
        self.raised, self.held, self.settled = False, [], []
        self.run, self.run_onset = 1, onset  # the episode goes on: nothing is learned of it

    def _reset_sum(self) -> None:
        self.sum = self.total = 0.0
        self.onset, self.length, self.frozen, self.run, self.calm, self.run_onset = -1, 0, 0, 0, 0, -1
        self.recent, self.excesses = [], []

    _BASELINES = ("loss", "gradient", "update", "spread")
    _SCALARS = (
        *("sum", "total", "recent", "excesses", "onset", "length", "frozen", "run", "calm", "run_onset"),
        *("fallen", "sudden", "previous", "nonfinite", "onset_nonfinite", "raised", "settled", "held"),
    )

    def state_dict(self) -> dict:
        """JSON-able; about 20 KB with full windows."""
        state = {name: getattr(self, name) for name in self._SCALARS}
        return {**state, **{name: getattr(self, name).state_dict() for name in self._BASELINES}}

    def load_state_dict(self, state: dict) -> None:
        for name in self._SCALARS:
            setattr(self, name, state.get(name, getattr(self, name)))  # earlier versions kept no fall
        for name in self._BASELINES:
            getattr(self, name).load_state_dict(state.get(name, {"values": [], "clock": []}))
