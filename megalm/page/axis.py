"""An axis: values to places on a picture, and the round numbers written along it."""

from collections.abc import Sequence
from math import ceil, floor, isfinite, log10


def format_count(value: float | None, digits: int = 3) -> str:
    """A count with its thousands, millions, ... as a letter: 6.65B."""
    if value is None:
        return "-"
    for limit, letter in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "B"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


class Axis:
    """Maps values to places between `start` and `end`, with a little air at both ends."""

    def __init__(self, values: Sequence[float], logarithmic: bool, start: float, end: float) -> None:
        self.logarithmic, self.start, self.end = logarithmic, start, end
        low, high = min(map(self._position, values)), max(map(self._position, values))
        air = (high - low) * 0.04 or (0.1 if logarithmic else max(abs(low), 1.0) * 0.05)
        self.low, self.high = low - air, high + air

    def __call__(self, value: float) -> float:
        share = (self._position(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether the value can be drawn on this axis."""
        return is_placeable(value, self.logarithmic) and self.low <= self._position(value) <= self.high

    def ticks(self, most: int = 8) -> list[float]:
        """Round numbers along the axis: 1, 2 or 5 times powers of ten, or powers of ten where it spans many."""
        if not self.logarithmic:
            return _round_numbers(self.low, self.high, most)
        decades = range(floor(self.low), floor(self.high) + 1)
        found: list[float] = []
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**d for d in decades for f in factors if self.low <= log10(f * 10.0**d) <= self.high]
            if len(found) <= most:
                break
        if len(found) < 2:
            return _round_numbers(10**self.low, 10**self.high, most)
        return found[:: ceil(len(found) / most)]

    def _position(self, value: float) -> float:
        return log10(value) if self.logarithmic else value


LARGEST = 1e300
"""Beyond it a value counts as infinite, and below its inverse as zero: an axis' length and decades must be numbers too."""


def is_placeable(value: float | None, logarithmic: bool) -> bool:
    """Whether there is a place for the value: finite, and above zero on a logarithmic axis."""
    return value is not None and isfinite(value) and abs(value) <= LARGEST and (value >= 1 / LARGEST or not logarithmic)


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** floor(log10(raw))
    if not power:  # so short an axis that there is no round number on it
        return [low, high]
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [round(i * step, 12) for i in range(ceil(low / step), floor(high / step) + 1)]
