"""How good a spike rule is on recorded curves: false alarms as they are, and what it finds of changes put into them."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.guard.trial.baselines import Guard, Rule
from megalm.guard.trial.curve import read_curve

HORIZON = 400
"""Samples after an injected change within which it may be found."""
FIRST = 200
"""Changes are put in after so many samples."""


@dataclass(frozen=True)
class Trace:
    """A recorded run."""

    name: str
    kind: str
    """healthy | sampled (not every step) | provoked (has an event column with a 1)"""
    steps: np.ndarray
    losses: np.ndarray
    norms: np.ndarray | None
    stride: float = 1.0
    event: int | None = None


def load_traces(folder: Path) -> list[Trace]:
    """Load every csv below a folder that has a column `loss`. Errors: ConfigError if there is none."""
    traces = []
    for path in sorted(folder.rglob("*.csv")):
        try:
            curve = read_curve(path)
        except ConfigError:
            continue
        norms = next((column for name in ("grad_norm", "gnorm") if (column := _column(path, name, curve.steps))), None)
        event = _column(path, "event", curve.steps)
        first = next((i for i, value in enumerate(event or []) if value >= 1), None)
        kind = "provoked" if event is not None else "sampled" if curve.stride >= 5 else "healthy"
        traces.append(
            Trace(
                path.stem,
                kind,
                np.array(curve.steps),
                np.array(curve.values),
                np.array(norms) if norms else None,
                curve.stride,
                first,
            )
        )
    if not traces:
        raise ConfigError(f"{folder}: no csv file with a column 'loss' is below it.")
    return traces


def _column(path: Path, name: str, steps: Sequence[int]) -> list[float] | None:
    try:
        values = read_curve(path, name).values
    except ConfigError:
        return None
    return values if len(values) == len(steps) else None


def make_synthetic_traces(count: int = 12, length: int = 4000, seed: int = 0) -> list[Trace]:
    """Power-law curves with 2.9% noise (Student's t, 8 degrees) and 3 in 1000 outliers of 0.25 in ln(loss) on average:
    the statistics of the real runs that the constants were chosen on."""
    traces = []
    for number in range(count):
        rng = np.random.default_rng(seed + number)
        steps = np.arange(length)
        level = 2.6 + 8.0 * (1.0 + steps / 12.0) ** -0.55
        jumps = np.where(rng.random(length) < 0.003, rng.exponential(0.25, length), 0.0)
        losses = level * np.exp(0.029 * rng.standard_t(8, length) + jumps)
        norms = np.exp(0.1 * rng.standard_t(8, length) + 2 * jumps)
        traces.append(Trace(f"synthetic-{number}", "healthy", steps, losses, norms))
    return traces


@dataclass(frozen=True)
class Injection:
    """A change of the loss, by samples since it began, in nats."""

    name: str
    shape: Callable[[np.ndarray], np.ndarray]
    wanted: bool
    """Whether a rollback is the right answer."""


INJECTIONS = (
    Injection("+0.2 for good", lambda t: np.full(len(t), 0.2), True),
    Injection("+0.4 for good", lambda t: np.full(len(t), 0.4), True),
    Injection("+0.8 for good", lambda t: np.full(len(t), 0.8), True),
    Injection("+0.01 a step", lambda t: 0.01 * t, True),
    Injection("+3, tau 30", lambda t: 3 * np.exp(-t / 30), True),
    Injection("+3, tau 2", lambda t: 3 * np.exp(-t / 2), False),
    Injection("+3, tau 4", lambda t: 3 * np.exp(-t / 4), False),
    Injection("+3 for 5 steps", lambda t: np.where(t < 5, 3.0, 0.0), False),
    Injection("+8 for 10 steps", lambda t: np.where(t < 10, 8.0, 0.0), False),
)


def count_false_alarms(make: Callable[[], Rule], traces: Sequence[Trace]) -> dict[str, float]:
    """Over curves without a fault: rollbacks and refused updates."""
    steps = rollbacks = skips = 0
    for trace in traces:
        rule = _rule(make, trace)
        for i, loss in enumerate(trace.losses.tolist()):
            answer = rule.observe(loss, float(trace.norms[i]) if trace.norms is not None else None)
            rollbacks += answer == "rollback"
            skips += answer == "skip"
        steps += len(trace.losses)
    return {
        "steps": steps,
        "rollbacks": rollbacks,
        "rollbacks_per_100k": 1e5 * rollbacks / steps,
        "rollbacks_per_100k_95_bound": 1e5 * _poisson_bound(rollbacks) / steps,
        "refused_per_10k": 1e4 * skips / steps,
    }


def _poisson_bound(events: int) -> float:
    """Upper 95% bound of a Poisson mean of which `events` were seen."""
    low, high = float(events), events + 20.0
    for _ in range(60):
        mean = (low + high) / 2
        below = sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(events + 1))
        low, high = (mean, high) if below > 0.05 else (low, mean)
    return high


def measure_detection(make: Callable[[], Rule], traces: Sequence[Trace], places: int, seed: int = 0) -> dict[str, Any]:
    """What the rule does about each injection: share answered by a rollback, and the delay in samples."""
    delays: dict[str, list[int | None]] = {injection.name: [] for injection in INJECTIONS}
    nan_flagged = nan_next = nan_total = 0
    for trace in traces:
        for at, rule in _states(make, trace, places, seed):
            losses = trace.losses[at : at + HORIZON]
            since = np.arange(len(losses))
            for injection in INJECTIONS:
                delays[injection.name].append(_delay(copy.deepcopy(rule), losses + injection.shape(since)))
            healthy = copy.deepcopy(rule).observe(float(losses[1]))
            broken = copy.deepcopy(rule)
            nan_total += 1
            nan_flagged += broken.observe(math.nan) != "none"
            nan_next += broken.observe(float(losses[1])) == healthy
    found = {injection.name: _summary(delays[injection.name], injection.wanted) for injection in INJECTIONS}
    return {"injections": found, "nan_flagged": nan_flagged / nan_total, "next_step_as_ever": nan_next / nan_total}


def _rule(make: Callable[[], Rule], trace: Trace) -> Rule:
    return Guard(trace.stride) if make is Guard else make()


def _states(make: Callable[[], Rule], trace: Trace, places: int, seed: int) -> list[tuple[int, Rule]]:
    length = len(trace.losses)
    if length < FIRST + HORIZON + 1:
        return []
    chooser = random.Random(f"{seed}/{trace.name}")
    wanted = sorted(chooser.randrange(FIRST, length - HORIZON) for _ in range(places))
    rule, states = _rule(make, trace), []
    for i in range(wanted[-1] + 1):
        states += [(i, copy.deepcopy(rule)) for at in wanted if at == i]
        rule.observe(float(trace.losses[i]))
    return states


def _delay(rule: Rule, losses: np.ndarray) -> int | None:
    return next((i for i, loss in enumerate(losses.tolist()) if rule.observe(loss) == "rollback"), None)


def _summary(delays: Sequence[int | None], wanted: bool) -> dict[str, Any]:
    found = sorted(d for d in delays if d is not None)
    total = len(delays)
    return {
        "wanted": wanted,
        "cases": total,
        "rolled_back": len(found) / total,
        "within_12": sum(d <= 12 for d in found) / total,
        "within_40": sum(d <= 40 for d in found) / total,
        "median_delay": found[len(found) // 2] if found else None,
        "p95_delay": found[min(len(found) - 1, int(0.95 * len(found)))] if found else None,
    }


def find_sustained_jumps(trace: Trace, rise: float = 0.4) -> list[int]:
    """Find samples where ln(loss) rose by `rise` over its last 16 and stayed there for 3, on curves that are quiet enough."""
    x = np.log(np.maximum(trace.losses, 1e-9))
    jumps: list[int] = []
    for i in range(32, len(x) - 3):
        before = x[i - 16 : i]
        lasting = min(x[i : i + 3]) - np.median(before) >= rise and np.ptp(before) < 0.75 * rise
        if lasting and (not jumps or i - jumps[-1] > 16):
            jumps.append(i)
    return jumps


def try_sampled(traces: Sequence[Trace]) -> dict[str, Any]:
    """On curves that hold every n-th step: sustained jumps caught within 8 samples, and all alarms."""
    jumps = caught = raised = samples = 0
    for trace in traces:
        rule = Guard(trace.stride)
        back = [i for i, loss in enumerate(trace.losses.tolist()) if rule.observe(loss) == "rollback"]
        for jump in find_sustained_jumps(trace):
            jumps += 1
            caught += any(jump <= i <= jump + 8 for i in back)
        raised += len(back)
        samples += len(trace.losses)
    return {"curves": len(traces), "samples": samples, "jumps": jumps, "caught": caught, "rollbacks": raised}


def try_provoked(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """On curves with a marked event: what the guard would have done, and how soon."""
    rows = []
    for trace in traces:
        rule, answers = Guard(trace.stride), []
        for i, loss in enumerate(trace.losses.tolist()):
            answers.append((i, rule.observe(loss)))
        event = trace.event if trace.event is not None else len(answers)
        after = [i for i, answer in answers if answer == "rollback" and i >= event]
        rows.append(
            {
                "curve": trace.name,
                "event": trace.event,
                "rollbacks_before": sum(a == "rollback" for i, a in answers if i < event),
                "delay": after[0] - event if after else None,
                "refused": sum(a == "skip" for _, a in answers),
            }
        )
    return rows


def observe_microseconds(traces: Sequence[Trace]) -> float:
    """What one step costs."""
    guard, losses = Guard(), traces[0].losses.tolist()[:2000]
    begun = time.process_time()
    for loss in losses:
        guard.observe(loss)
    return 1e6 * (time.process_time() - begun) / len(losses)
