"""metrics.jsonl: the steps that a run made. A run that goes back makes steps again; the last time counts.

made      1 2 3 4 5 6 7 | 4 5 6 7 8      at step 7 the run went back to step 3
steps     1 2 3           4 5 6 7 8      what counts: medians, fits, lines, the detector's curve
abandoned       [4 5 6 7]                shown pale, wherever there is a picture
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.journal.lines import Row, read_json_lines

TEXTS = ("phase",)
"""Fields of a step that are words; all others are numbers."""
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Course:
    """The steps as they count, and the stretches that the run went back on, each in the order of its steps."""

    steps: list[Row]
    abandoned: list[list[Row]]


def read_steps(path: Path) -> list[Row]:
    """Read every step that was made, in the order of making; numbers that are not finite are numbers again."""
    return [_numbers(row) for row in read_json_lines(path, _is_step)]


def read_course(path: Path) -> Course:
    """Read a metrics.jsonl: the steps that count, and those that the run went back on."""
    return choose_course(read_steps(path))


def choose_course(made: Sequence[Row]) -> Course:
    """Choose the steps that count: of a step made twice the last, and none that the run went back on."""
    steps: list[Row] = []
    abandoned: list[list[Row]] = []
    for record in made:
        first = len(steps)
        while first and steps[first - 1]["step"] >= record["step"]:
            first -= 1
        if first < len(steps):
            abandoned.append(steps[first:])
            del steps[first:]
        steps.append(record)
    return Course(steps, abandoned)


def _is_step(row: Row) -> bool:
    step = row.get("step")
    return isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step) and step == int(step)


def _numbers(row: Row) -> Row:
    read = {key: _number(value) if key not in TEXTS else value for key, value in row.items()}
    return {**read, "step": int(row["step"])}


def _number(value: Any) -> Any:
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value
