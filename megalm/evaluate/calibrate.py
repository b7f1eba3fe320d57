"""Which tasks tell models apart at which size: signal and noise of each, from the runs of a scaling ladder.

signal = (largest - smallest) / mean of the final figures of runs of about one size; noise = standard deviation / mean over the
last evaluations of one run. A task whose ratio is small cannot tell the runs apart, whatever its figures say.

Source: Heineman et al. 2025 (arXiv:2508.13144)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalm.architecture.tensors import count_parameters
from megalm.config.attempts import CONFIG
from megalm.config.errors import ConfigError
from megalm.config.saved import load_config
from megalm.journal import read_course, read_number

LAST = 5
"""Evaluations at a run's end whose spread is its noise."""
TRUSTED = 2.0
"""Ratio from which a task tells runs of this size apart: their spread is twice what one run's own figures move by."""
SAME_SIZE = 1.3
"""Runs whose parameters differ by less than this factor are of one size."""


@dataclass(frozen=True)
class Calibration:
    """One figure at one size."""

    parameters: int
    """Of the smallest run of this size."""
    figure: str
    runs: int
    mean: float
    signal: float | None
    """None for a single run."""
    noise: float | None
    """None where no run has two evaluations."""
    above_chance: float | None
    """Standard errors above chance, of accuracies whose chance is known; else None."""

    @property
    def ratio(self) -> float | None:
        if self.signal is None or self.noise is None:
            return None
        return self.signal / self.noise if self.noise > 0 else (float("inf") if self.signal > 0 else 0.0)

    @property
    def trusted(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= TRUSTED

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "trusted": self.trusted}


@dataclass(frozen=True)
class LadderRun:
    """A run's size and its evaluations, each figure by its name."""

    folder: Path
    parameters: int
    figures: dict[str, list[float]]
    errors: dict[str, float]
    """Standard errors of the last ones."""


def read_run(folder: Path) -> LadderRun:
    """Errors: ConfigError for what is no run, or one that was asked no suite"""
    config = load_config(folder / CONFIG)
    steps = read_course(folder / "metrics.jsonl").steps
    figures: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for step in steps:
        for key, value in step.items():
            number = read_number(value)
            if not key.startswith("eval/") or key in ("eval/seconds", "eval/loss") or number is None:
                continue
            name = key.removeprefix("eval/")
            if name.endswith("_stderr"):
                errors[name.removesuffix("_stderr")] = number
            else:
                figures.setdefault(name, []).append(number)
    if not figures:
        raise ConfigError(f"{folder}: no tasks were asked of it: train with evaluate.every=... evaluate.suite=...")
    return LadderRun(folder, count_parameters(config.model).total, figures, errors)


def group_by_size(runs: Sequence[LadderRun]) -> list[list[LadderRun]]:
    """Runs of about one size together, the smallest first."""
    groups: list[list[LadderRun]] = []
    for run in sorted(runs, key=lambda run: run.parameters):
        if groups and run.parameters < SAME_SIZE * groups[-1][0].parameters:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def calibrate(runs: Sequence[LadderRun], chances: dict[str, float] | None = None) -> list[Calibration]:
    """Signal and noise of each figure that all runs of a size have. chances: accuracy of guessing, by task."""
    found = []
    for group in group_by_size(runs):
        names = [name for name in group[0].figures if all(name in run.figures for run in group)]
        for name in names:
            finals = [statistics.fmean(run.figures[name][-LAST:]) for run in group]
            mean = statistics.fmean(finals)
            noises = [_relative_spread(run.figures[name][-LAST:]) for run in group]
            known = [noise for noise in noises if noise is not None]
            chance = (chances or {}).get(name.split("/")[0]) if "/acc" in name else None
            error = statistics.fmean([run.errors.get(name, 0.0) for run in group])
            found.append(
                Calibration(
                    parameters=group[0].parameters,
                    figure=name,
                    runs=len(group),
                    mean=mean,
                    signal=(max(finals) - min(finals)) / abs(mean) if len(finals) > 1 and mean else None,
                    noise=statistics.fmean(known) if known else None,
                    above_chance=(mean - chance) / error if chance is not None and error else None,
                )
            )
    return found


def _relative_spread(values: Sequence[float]) -> float | None:
    mean = statistics.fmean(values)
    return statistics.stdev(values) / abs(mean) if len(values) > 1 and mean else None
