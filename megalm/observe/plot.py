"""A line over steps as a picture in the terminal."""

import math
from collections.abc import Iterator, Sequence

from megalm.journal import format_number

# Dots of a braille character by (row, column) of its 4 x 2 grid (Unicode 15, block U+2800).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))

Point = tuple[float, float]
"""(step, value)"""

PALE_EVERY = 4
"""Of what was gone back on one dot in so many columns is drawn: not every terminal has a paler ink."""


def draw_text_plot(
    points: Sequence[Point],
    *,
    abandoned: Sequence[Sequence[Point]] = (),
    width: int = 64,
    height: int = 10,
    title: str = "",
    marks: Sequence[float] = (),
) -> str:
    """Draw the values over their steps in braille dots, with the range on the left and the steps below.

    Values that are not finite have no place; where several steps share a column their mean is drawn.

    Args: abandoned: stretches that a run went back on, drawn as single dots. width, height: of the picture in characters.
    marks: steps to point at from below.
    """
    stretches = [points, *abandoned]
    steps = [step for stretch in stretches for step, _ in stretch]
    values = [value for stretch in stretches for _, value in stretch if math.isfinite(value)]
    if not steps:
        return "(nothing to plot)"
    if not values:
        return "(no finite values to plot)"
    picture = _Picture(width, height, (min(steps), max(steps)), (min(values), max(values)))
    for stretch in abandoned:
        picture.dot(stretch)
    picture.line(points)
    lines = [f"{title}; dotted: gone back on" if any(abandoned) else title] if title else []
    lines += picture.rows()
    if marks:
        places = {picture.column(mark) // 2 for mark in marks}
        lines.append(" " * 10 + "".join("▲" if column in places else " " for column in range(width)).rstrip())
    first, last = format_number(min(steps), ".0f"), format_number(max(steps), ".0f")
    lines.append(" " * 10 + f"{first:<{width - len(last)}}{last}")
    return "\n".join(lines)


class _Picture:
    """Dots on a grid of 2 x 4 a character, over a range of steps and one of values."""

    def __init__(self, width: int, height: int, steps: tuple[float, float], values: tuple[float, float]) -> None:
        self.width, self.height, self.steps, self.values = width, height, steps, values
        self.cells = [[0] * width for _ in range(height)]

    def column(self, step: float) -> int:
        """Find the step's column of dots."""
        first, last = self.steps
        share = (step - first) / ((last - first) or 1)
        return round(min(max(share, 0.0), 1.0) * (2 * self.width - 1))

    def line(self, points: Sequence[Point]) -> None:
        """Draw the points joined."""
        before: int | None = None
        for column, level in self._levels(points):
            begin = level if before is None else before
            for row in range(min(begin, level), max(begin, level) + 1):
                self._set(column, row)
            before = level

    def dot(self, points: Sequence[Point]) -> None:
        """Draw the points so that they stand behind a line."""
        for place, (column, level) in enumerate(self._levels(points)):
            if place % PALE_EVERY == 0:
                self._set(column, level)

    def rows(self) -> list[str]:
        """Give the picture's lines, with the range of the values on the left."""
        low, high = self.values
        lines = []
        for number, cells in enumerate(self.cells):
            label = _label(high) if number == 0 else _label(low) if number == self.height - 1 else ""
            lines.append(f"{label:>8} │" + "".join(chr(0x2800 + cell) for cell in cells))
        return [*lines, " " * 9 + "└" + "─" * self.width]

    def _set(self, column: int, row: int) -> None:
        self.cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    def _levels(self, points: Sequence[Point]) -> Iterator[tuple[int, int]]:
        """Yield (column, row) of every column from the first finite point to the last, on straight lines between them."""
        shared: dict[int, list[float]] = {}
        for step, value in points:
            if math.isfinite(value):
                shared.setdefault(self.column(step), []).append(value)
        known = [(column, sum(value / len(values) for value in values)) for column, values in sorted(shared.items())]
        for (column, value), (end, other) in zip(known, known[1:], strict=False):
            for between in range(column, end):
                share = (between - column) / (end - column)
                yield between, self._row(value * (1 - share) + other * share)
        if known:
            yield known[-1][0], self._row(known[-1][1])

    def _row(self, value: float) -> int:
        low, high = self.values
        span = (high / 2 - low / 2) or 1.0  # halves, since a whole span may be beyond the largest number
        share = (high / 2 - value / 2) / span
        return round(min(max(share, 0.0), 1.0) * (4 * self.height - 1))


def _label(value: float) -> str:
    """Write a value in at most eight characters."""
    plain = (".3f",) if 0.001 <= abs(value) < 10_000 or value == 0 else ()
    texts = [format_number(value, form) for form in (*plain, ".2e", ".1e", ".0e")]
    return next(text for text in texts if len(text) <= 8)
