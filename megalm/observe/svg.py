"""Line charts as SVG text, for pages that must stand alone."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 30
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    pale: bool = False
    """Drawn faintly, without a name: what the run went back on."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at an event, with what happened in its tooltip."""

    x: float
    text: str
    colour: str = "#f59e0b"


@dataclass
class Chart:
    """Curves over one axis. `log`: the vertical axis is logarithmic."""

    title: str
    unit: str
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)
    log: bool = False

    def svg(self) -> str:
        """The chart as an <svg> element; a sentence when there is nothing to draw."""
        curves = [
            (line, [(x, y) for x, y in zip(line.x, line.y, strict=True) if self._drawable(y)]) for line in self.lines
        ]
        points = [point for _, curve in curves for point in curve]
        if not points:
            return f"<p>{html.escape(self.title)}: nothing was measured.</p>"
        x_low, x_high = _widened(min(x for x, _ in points), max(x for x, _ in points))
        y_low, y_high = _widened(self._scaled(min(y for _, y in points)), self._scaled(max(y for _, y in points)))

        def at(x: float, y: float) -> tuple[float, float]:
            return (
                LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (self._scaled(y) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
            )

        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">']
        parts.append(
            f'<text x="{LEFT}" y="16" class="title">{html.escape(self.title)} ({html.escape(self.unit)})</text>'
        )
        for value in ticks(y_low, y_high):
            shown = 10**value if self.log else value
            _, y = at(x_low, shown)
            parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown:.4g}</text>')
        for value in ticks(x_low, x_high, 6):
            x = LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:,.6g}</text>')
        for mark in self.marks:
            if x_low <= mark.x <= x_high:
                x = LEFT + (mark.x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
                parts.append(
                    f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{mark.colour}" '
                    f'stroke-width="1.5" stroke-dasharray="4 3"><title>{html.escape(mark.text)}</title></line>'
                )
        for line, curve in curves:
            if line.pale:
                path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in _thinned(curve))
                parts.append(f'<polyline points="{path}" fill="none" stroke="#9ca3af" stroke-width="1" opacity="0.6"/>')
        named = [(line, curve) for line, curve in curves if not line.pale]
        for number, (line, curve) in enumerate(named):
            colour = COLOURS[number % len(COLOURS)]
            path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in _thinned(curve))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
            if len(named) > 1:
                parts.append(
                    f'<text x="{WIDTH - RIGHT}" y="{16 + 14 * number}" text-anchor="end" fill="{colour}" '
                    f'style="fill:{colour}">{html.escape(line.label)}</text>'
                )
        return "\n".join([*parts, "</svg>"])

    def _drawable(self, value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, with a little air above and below."""
    air = (high - low) * 0.04 or max(abs(low), 1.0) * 0.05
    return low - air, high + air


def _thinned(points: list[tuple[float, float]], limit: int = 1200) -> list[tuple[float, float]]:
    """At most `limit` points, keeping each group's lowest and highest so that no spike disappears."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        kept.extend(sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])}))
    return kept
