"""A line of numbers as a picture in the terminal."""

import math
from collections.abc import Sequence

# Dots of a braille character by (row, column) of its 4 x 2 grid (Unicode 15, block U+2800).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def thin(values: Sequence[float], count: int) -> list[float]:
    """At most `count` means of neighbouring finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) <= count:
        return finite
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    return [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def text_plot(
    values: Sequence[float],
    *,
    width: int = 64,
    height: int = 10,
    first: int = 1,
    last: int | None = None,
    title: str = "",
    marks: Sequence[int] = (),
) -> str:
    """The values over their index, in braille dots, with the range on the left and the steps below.

    Args: width, height: of the picture in characters. first, last: step numbers of the first and the last value.
    marks: indices of values to point at from below.
    """
    if not values:
        return "(nothing to plot)"
    points = thin(values, 2 * width)
    if not points:
        return "(no finite values to plot)"
    low, high = min(points), max(points)
    span = (high - low) or 1.0
    rows = [[0] * width for _ in range(height)]
    columns = _stretch(points, 2 * width)
    levels = [round((high - value) / span * (4 * height - 1)) for value in columns]
    for column, (begin, level) in enumerate(zip([levels[0], *levels], levels, strict=False)):
        for dot in range(min(begin, level), max(begin, level) + 1):
            rows[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
    lines = [title] if title else []
    for number, row in enumerate(rows):
        label = f"{high:8.3f} " if number == 0 else f"{low:8.3f} " if number == height - 1 else " " * 9
        lines.append(label + "│" + "".join(chr(0x2800 + cell) for cell in row))
    lines.append(" " * 9 + "└" + "─" * width)
    if marks:
        places = {min(mark * width // len(values), width - 1) for mark in marks}
        lines.append(" " * 10 + "".join("▲" if column in places else " " for column in range(width)).rstrip())
    end = str(first + len(values) - 1 if last is None else last)
    lines.append(" " * 10 + f"{first:<{width - len(end)}}{end}")
    return "\n".join(lines)


def _stretch(points: Sequence[float], count: int) -> list[float]:
    """`count` values on the straight lines between the points."""
    values = []
    for column in range(count):
        place = column * (len(points) - 1) / (count - 1)
        left = min(int(place), len(points) - 2) if len(points) > 1 else 0
        right = min(left + 1, len(points) - 1)
        values.append(points[left] + (place - left) * (points[right] - points[left]))
    return values
