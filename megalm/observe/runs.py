"""Runs side by side: what differs in their settings, what each one came to, their curves on one page."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.attempts import CONFIG
from megalm.config.errors import ConfigError, explain_missing_folder
from megalm.config.scalars import read_any
from megalm.config.typed import show
from megalm.config.yaml_text import read_yaml_file
from megalm.journal import read_course, read_events, read_number
from megalm.page.document import Block, Facts, Table, render_page
from megalm.page.plots import Line, Lines

METRICS = "metrics.jsonl"
UNIMPORTANT = ("run.name", "run.dir")
"""Settings in which runs differ because they are two."""
SMOOTH = 0.9
"""Share of the smooth line that a step leaves as it was."""
LONGEST_SETTING = 60
"""Characters of a setting in a table."""
WIDE = 20.0
"""Where the largest value is more than this times the smallest, the axis is logarithmic: so a run that blew up leaves
room for the others."""
CURVES = (
    ("loss", "training loss"),
    ("eval/loss", "held-out loss"),
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
)


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder says of it."""

    folder: Path
    settings: dict[str, Any]
    """Dotted key -> value, of its newest config.yaml."""
    steps: list[dict[str, Any]]
    """The steps that count."""
    spikes: int
    values: dict[str, float | None] = field(default_factory=dict)
    """Metric -> its last value, and `best METRIC` for held-out losses."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def last_step(self) -> int:
        """The newest step; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Find the folders of runs among the given ones and directly below them, each once, in the order given.

    Errors: ConfigError for a place that is no folder or holds no run.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise explain_missing_folder(place, "runs' folders, or one that holds runs")
        own = [place] if (place / METRICS).is_file() else []
        inner = own or sorted(file.parent for file in place.glob(f"*/{METRICS}"))
        if not inner:
            raise ConfigError(f"{place}: holds no run that has made a step (no {METRICS} in it or one folder below).")
        found += inner
    return list({folder.resolve(): folder for folder in found}.values())


def summarize(folder: Path) -> RunSummary:
    """Read a run's folder. Errors: ConfigError where its config.yaml is damaged."""
    steps = read_course(folder / METRICS).steps
    file = folder / CONFIG
    settings = dict(_flat(read_yaml_file(file, str(file)))) if file.is_file() else {}
    events = read_events(folder / "events.jsonl")
    run = RunSummary(folder, settings, steps, sum(event.get("kind") == "spike" for event in events))
    for key in dict.fromkeys(key for step in steps for key in step):
        numbers = [number for step in steps if (number := read_number(step.get(key))) is not None]
        if not numbers:
            continue
        run.values[key] = numbers[-1]
        if key == "eval/loss" or (key.startswith("eval/") and key.endswith("/bits_per_byte")):
            run.values[f"best {key}"] = min(numbers)
    losses = [number for step in steps[-50:] if (number := read_number(step.get("loss"))) is not None]
    run.values["loss (mean of 50)"] = statistics.fmean(losses) if losses else None
    speeds = [number for step in steps[3:] if (number := read_number(step.get("tokens_per_s"))) is not None]
    run.values["tokens_per_s (median)"] = statistics.median(speeds) if speeds else None
    return run


def list_differing_settings(runs: Sequence[RunSummary]) -> list[str]:
    """List the keys in which the runs' settings differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in UNIMPORTANT)
    return [key for key in keys if len({show(run.settings.get(key)) for run in runs}) > 1]


def rank(runs: Sequence[RunSummary], metric: str | None, highest: bool = False) -> tuple[str, list[RunSummary]]:
    """The metric that decides, and the runs by it, the best first; runs without it come last.

    metric: default: the last held-out loss where every run has one, else the mean training loss of the last 50 steps.
    Errors: ConfigError for a metric that no run has.
    """
    if metric is None:
        metric = "eval/loss" if all(run.values.get("eval/loss") is not None for run in runs) else "loss (mean of 50)"
    elif all(run.values.get(metric) is None for run in runs):
        there = sorted({key for run in runs for key, value in run.values.items() if value is not None})
        raise ConfigError(f"no run has the metric {metric!r}. There are: {', '.join(there)}.")

    def place(run: RunSummary) -> float:
        value = run.values.get(metric)
        return float("inf") if value is None or value != value else -value if highest else value

    return metric, sorted(runs, key=place)


def tabulate_comparison(runs: Sequence[RunSummary], metric: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table: name, what differs, steps, the metric, losses, speed, spikes."""
    keys = list_differing_settings(runs)
    metrics = dict.fromkeys([metric, "loss (mean of 50)", "eval/loss", "tokens_per_s (median)"])
    shown_metrics = [key for key in metrics if any(run.values.get(key) is not None for run in runs)]
    headers = ["run", *keys, "steps", *shown_metrics, "spikes"]
    rows = [
        [
            run.name,
            *(shorten(run.settings.get(key)) for key in keys),
            str(run.last_step),
            *(format_number(run.values.get(key)) for key in shown_metrics),
            str(run.spikes),
        ]
        for run in runs
    ]
    return headers, rows


def shorten(setting: Any) -> str:
    """Show a setting as a table has room for: of a list of mappings what each begins with, of what is long its beginning."""
    if isinstance(setting, list) and setting and all(isinstance(one, dict) and one for one in setting):
        setting = [next(iter(one.values())) for one in setting]
    text = show(setting)
    return text if len(text) <= LONGEST_SETTING else f"{text[: LONGEST_SETTING - 1]}\u2026"


def write_comparison_page(runs: Sequence[RunSummary], metric: str, highest: bool = False) -> str:
    """One page with the table and the curves of all runs over each other: smooth, the measured points pale behind."""
    headers, rows = tabulate_comparison(runs, metric)
    best = runs[0]
    blocks: list[Block] = [
        Facts(
            {
                "runs": str(len(runs)),
                f"best ({'highest' if highest else 'lowest'} {metric})": best.name,
                metric: format_number(best.values.get(metric)),
                "model": str(best.settings.get("model.name", "")),
            }
        ),
        Table("the best first", headers, rows),
    ]
    for key, title in CURVES:
        lines = []
        for run in runs:
            points = [(step["step"], y) for step in run.steps if (y := read_number(step.get(key))) is not None]
            if key in ("loss", "grad_norm") and len(points) > 1:
                lines += [Line(run.name, points, pale=True), Line(run.name, smooth(points))]
            elif points:
                lines.append(Line(run.name, points))
        if lines:
            values = [y for line in lines for _, y in line.points if y - y == 0]
            wide = key != "lr" and bool(values) and min(values) > 0 and max(values) > WIDE * min(values)
            blocks.append(Lines(title, "step", key, lines, log="y" if wide else ""))
    return render_page(f"{len(runs)} runs compared", blocks)


def smooth(points: Sequence[tuple[float, float]], share: float = SMOOTH) -> list[tuple[float, float]]:
    """An exponential mean that starts without a bias towards 0; what is not finite is left out."""
    mean, weight, found = 0.0, 0.0, []
    for x, y in points:
        if y - y != 0:
            continue
        mean, weight = share * mean + (1 - share) * y, share * weight + (1 - share)
        found.append((x, mean / weight))
    return found


def format_number(value: float | None) -> str:
    """A number as a table shows it."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_comparison_json(runs: Sequence[RunSummary], metric: str) -> str:
    """The comparison for a program: the best first."""
    keys = list_differing_settings(runs)
    rows = [
        {
            "run": str(run.folder),
            "settings": {key: run.settings.get(key) for key in keys},
            "steps": run.last_step,
            "spikes": run.spikes,
            "metrics": {
                key: None if value is None or value - value != 0 else value for key, value in run.values.items()
            },
        }
        for run in runs
    ]
    return json.dumps({"metric": metric, "runs": rows}, indent=2)


def _flat(values: Any, prefix: str = "") -> Any:
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", read_any(value) if isinstance(value, str) else value
