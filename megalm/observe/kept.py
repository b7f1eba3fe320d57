"""A few numbers of every step that this process made, kept for the end of the run."""

import math
from array import array
from typing import Any

from megalm.journal import read_number


class KeptSteps:
    """Keeps eight bytes a number: whole records of a million steps would take a gigabyte."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys
        self._columns = {key: array("d") for key in ("step", *keys)}

    def __len__(self) -> int:
        return len(self._columns["step"])

    @property
    def last_step(self) -> int:
        """The step made last; 0 before the first."""
        return int(self._columns["step"][-1]) if len(self) else 0

    def add(self, record: dict[str, Any]) -> None:
        """Keep the numbers of a step; NaN stands for what was not measured."""
        for key, column in self._columns.items():
            value = read_number(record.get(key))
            column.append(math.nan if value is None else value)

    def rows(self, first: int = 0) -> list[dict[str, Any]]:
        """Yield the steps as records, in the order of making, from the `first`-th on."""
        columns = [self._columns[key][first:] for key in self.keys]
        steps = map(int, self._columns["step"][first:])
        return [
            {"step": step, **dict(zip(self.keys, row, strict=True))} for step, *row in zip(steps, *columns, strict=True)
        ]
