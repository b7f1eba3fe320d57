"""The detector over a recorded curve: any csv with a header, or a metrics.jsonl."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.guard import DetectorConfig
from megalm.guard.detect import Observation, SpikeDetector, config_for_stride
from megalm.guard.policy import unprobed_action

STEP_COLUMNS = ("step", "iteration", "iter", "global_step", "_step")


@dataclass(frozen=True)
class Curve:
    """A column of a log, by step."""

    steps: list[int]
    values: list[float]

    @property
    def stride(self) -> float:
        """Steps between two samples (the median)."""
        gaps = sorted(b - a for a, b in zip(self.steps, self.steps[1:], strict=False))
        return gaps[len(gaps) // 2] if gaps else 1


def read_curve(path: Path | str, column: str = "loss") -> Curve:
    """Read a csv (with a header; commas, semicolons or tabs between the cells) or jsonl log.

    Steps come from the first column named step, iteration, ... (in any case), else rows are counted. An empty cell is
    a value that was not logged, unless nearly all others are filled: then it stands for NaN, as pandas writes it.
    Errors: ConfigError if the file or the column is not there (with the columns it has), or a value is no number.
    """
    path = Path(path)
    rows = _rows(path)
    columns = list(dict.fromkeys(key for row in rows for key in row if key))
    if column not in columns:
        named = ", ".join(columns) or "none"
        raise ConfigError(f"{path} has no column {column!r}. Its columns: {named}. Choose one with --column.")
    known = {name.lower(): name for name in reversed(columns)}
    step_column = next((known[name] for name in STEP_COLUMNS if name in known), None)
    filled = sum(1 for row in rows if row.get(column) not in (None, ""))
    empty_is_nan = filled > 0.9 * len(rows)
    steps, values = [], []
    for number, row in enumerate(rows):
        text = row.get(column)
        if text in (None, ""):
            if not empty_is_nan:
                continue
            text = "nan"
        step = row.get(step_column) if step_column else number
        steps.append(int(_number(path, number, step_column or "row", step)))
        values.append(_number(path, number, column, text))
    if not values:
        raise ConfigError(f"{path}: column {column!r} holds no value. Its columns: {', '.join(columns)}.")
    return Curve(steps, values)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: give a csv file with a header, or a run's metrics.jsonl.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a text file: give a csv file with a header, or a metrics.jsonl.") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty: give a csv file with a header, or a run's metrics.jsonl.")
    if text.lstrip().startswith("{"):
        return _json_rows(path, text)
    lines = text.splitlines()
    rows = csv.DictReader(lines, skipinitialspace=True, delimiter=max(",;\t", key=lines[0].count))
    found = [{(key or "").strip(): value for key, value in row.items() if key is not None} for row in rows]
    if not found:
        raise ConfigError(f"{path} has the columns {', '.join(rows.fieldnames or [])}, and no row below them.")
    return found


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) - 1:
                break  # cut off by a crash
            raise ConfigError(f"{path}, line {number + 1}: not a JSON object: {line[:60]!r}.") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _number(path: Path, row: int, column: str, text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}, row {row + 1}: column {column!r} holds {text!r}, which is not a number.") from None
    if column.lower() in STEP_COLUMNS and not math.isfinite(value):
        raise ConfigError(f"{path}, row {row + 1}: step {text!r} is not a number of steps.")
    return value


@dataclass(frozen=True)
class Alarm:
    """A step that the detector flagged, and what the default policy would do with no probe to ask."""

    step: int
    kind: str
    action: str
    z: float
    onset: int

    def as_dict(self) -> dict[str, Any]:
        z = self.z if math.isfinite(self.z) else None
        return {"step": self.step, "kind": self.kind, "action": self.action, "z": z}


def alarms(curve: Curve, config: DetectorConfig | None = None) -> list[Alarm]:
    """Run the detector over the curve."""
    detector = SpikeDetector(config or config_for_stride(curve.stride))
    found = []
    for step, value in zip(curve.steps, curve.values, strict=True):
        seen = detector.observe(step, value)
        if seen.kind != "none":
            found.append(_alarm(seen))
    return found


def _alarm(seen: Observation) -> Alarm:
    return Alarm(seen.step, seen.kind, unprobed_action(seen.kind, seen.lasting), round(seen.z, 3), seen.onset)
