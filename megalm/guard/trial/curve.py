"""The detector over a recorded curve: any csv with a header, or a metrics.jsonl."""

from __future__ import annotations

import codecs
import csv
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.guard import DetectorConfig
from megalm.guard.detect import Observation, SpikeDetector, adapt_to_stride
from megalm.guard.policy import choose_unprobed_action
from megalm.journal import choose_course, parse_json_lines

STEP_COLUMNS = ("step", "iteration", "iter", "global_step", "_step")

Stretch = list[tuple[int, float]]
"""(step, value), in the order of the steps"""


@dataclass(frozen=True)
class Curve:
    """A column of a log, by step: each step once, in their order."""

    steps: list[int]
    values: list[float]
    abandoned: list[Stretch] = field(default_factory=list)
    """What the run went back on, to make the same steps again."""

    @property
    def points(self) -> Stretch:
        """(step, value) of the steps that count."""
        return list(zip(self.steps, self.values, strict=True))

    @property
    def stride(self) -> float:
        """Steps between two samples (the median)."""
        gaps = sorted(b - a for a, b in zip(self.steps, self.steps[1:], strict=False))
        return gaps[len(gaps) // 2] if gaps else 1


def read_curve(path: Path | str, column: str = "loss") -> Curve:
    """Read a csv (with a header; commas, semicolons or tabs between the cells) or jsonl log.

    Steps come from the first column named step, iteration, ... (in any case), else rows are counted. Of a step that was
    made twice the last counts; a log whose newest row comes first is turned round. An empty cell is a value that was not
    logged, unless nearly all others are filled: then it stands for NaN, as pandas writes it.
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
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        text = row.get(column)
        if text in (None, ""):
            if not empty_is_nan:
                continue
            text = "nan"
        step = row.get(step_column) if step_column else number
        step = int(_number(path, number, step_column or "row", step))
        made.append({"step": step, "value": _number(path, number, column, text)})
    if not made:
        raise ConfigError(f"{path}: column {column!r} holds no value. Its columns: {', '.join(columns)}.")
    if made[0]["step"] > made[-1]["step"] and all(a["step"] >= b["step"] for a, b in pairwise(made)):
        made.reverse()
    course = choose_course(made)
    steps, *abandoned = ([(row["step"], row["value"]) for row in each] for each in (course.steps, *course.abandoned))
    return Curve([step for step, _ in steps], [value for _, value in steps], abandoned)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: give a csv file with a header, or a run's metrics.jsonl.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a csv file, or a metrics.jsonl.") from None
    text = data.strip(b"\0 \t\r\n")  # a power cut leaves zeros
    if not text:
        raise ConfigError(f"{path} is empty: give a csv file with a header, or a run's metrics.jsonl.")
    if path.suffix == ".jsonl" or text.startswith(b"{"):
        rows = parse_json_lines(data.split(b"\n"), str(path))
        if not rows:
            raise ConfigError(f"{path} has no line that is a JSON object: give a csv file, or a run's metrics.jsonl.")
        return rows
    return _table_rows(path, data)


def _table_rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    whole = data.endswith((b"\n", b"\r"))
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data.replace(b"\0", b""), final=whole)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file: give a csv file with a header, or a metrics.jsonl.") from None
    lines = text.splitlines()
    rows = csv.DictReader(lines, skipinitialspace=True, delimiter=max(",;\t", key=lines[0].count))
    found = [{(key or "").strip(): value for key, value in row.items() if key is not None} for row in rows]
    if found and not whole and any(value is None for value in found[-1].values()):
        found.pop()  # cut off by a crash
    if not found:
        raise ConfigError(f"{path} has the columns {', '.join(rows.fieldnames or [])}, and no row below them.")
    return found


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


def list_alarms(curve: Curve, config: DetectorConfig | None = None) -> list[Alarm]:
    """Run the detector over the curve."""
    detector = SpikeDetector(config or adapt_to_stride(curve.stride))
    found = []
    for step, value in zip(curve.steps, curve.values, strict=True):
        seen = detector.observe(step, value)
        if seen.kind != "none":
            found.append(_alarm(seen))
    return found


def _alarm(seen: Observation) -> Alarm:
    return Alarm(seen.step, seen.kind, choose_unprobed_action(seen.kind, seen.lasting), round(seen.z, 3), seen.onset)
