"""Plots as SVG text. Each is data first; `svg()` draws it, with colours that the page's style gives (light and dark)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from megalm.page.axis import Axis, format_count, is_placeable

COLOURS = ("#3b6fb6", "#d9802b", "#4f9d69", "#b6524f", "#8063ab", "#4aa3a8", "#c9a227", "#7d8894")
FEW_POINTS = 1200
"""A line of more points is thinned before it is drawn: about two for each pixel."""
LETTER = 7.2
"""About the width of a letter of the legend."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    pale: bool = False
    """Drawn faintly and not named: what was left behind."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at an event; its kind is named in the legend, its text in the tooltip."""

    x: float
    kind: str
    text: str
    colour: str


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the horizontal axis."""

    first: float
    last: float
    kind: str
    text: str
    colour: str = COLOURS[7]


@dataclass
class Lines:
    """Curves over two axes, those named in `log` logarithmic."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: str = ""
    marks: Sequence[Mark] = ()
    bands: Sequence[Band] = ()
    dots: Sequence[tuple[str, float, float]] = ()
    height: int = 240

    def svg(self) -> str:
        """The plot, 720 units wide; a sentence where there is nothing to draw."""
        lines = [(line, [p for p in line.points if self._placeable(p)]) for line in self.lines]
        everything = [point for _, points in lines for point in points]
        everything += [(x, y) for _, x, y in self.dots if self._placeable((x, y))]
        if not everything:
            return f"<p>{_text(self.title)}: nothing was measured.</p>"
        left, right = 64.0, 708.0
        names = _colours([line.label for line, _ in lines if not line.pale])
        legend = _Legend(left, right)
        if len(names) > 1:
            legend.add([(name, colour, "") for name, colour in names.items()])
        legend.add(list(dict.fromkeys((mark.kind, mark.colour, "4 3") for mark in self.marks)))
        legend.add(list(dict.fromkeys((band.kind, band.colour, "band") for band in self.bands)))
        top = legend.bottom + 6.0
        bottom = top + self.height
        x_axis = Axis([x for x, _ in everything], "x" in self.log, left, right)
        y_axis = Axis([y for _, y in everything], "y" in self.log, bottom, top)
        out = [_open(720, bottom + 40, self.title), *legend.parts]
        for value in x_axis.ticks():
            at = x_axis(value)
            out.append(_rule(at, at, top, bottom))
            out.append(f'<text x="{at:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{_axis_number(value)}</text>')
        for value in y_axis.ticks(6):
            at = y_axis(value)
            out.append(_rule(left, right, at, at))
            out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_axis_number(value)}</text>')
        for band in self.bands:
            first, last = (min(max(x_axis(x), left), right) for x in (band.first, band.last))
            out.append(
                f'<rect x="{first:.1f}" y="{top:.1f}" width="{max(last - first, 1.0):.1f}" height="{self.height}" '
                f'fill="{band.colour}" opacity="0.22"><title>{_text(band.text)}</title></rect>'
            )
        for line, points in sorted(lines, key=lambda item: not item[0].pale):
            path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in thin(points))
            look = 'class="pale"' if line.pale else f'stroke="{names[line.label]}"'
            out.append(f'<polyline points="{path}" fill="none" stroke-width="1.5" {look}/>')
        for mark in self.marks:
            if x_axis.holds(mark.x):
                at = x_axis(mark.x)
                out.append(
                    f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{mark.colour}" '
                    f'stroke-width="1.5" stroke-dasharray="4 3"><title>{_text(mark.text)}</title></line>'
                )
        for name, x, y in self.dots:
            place = f"{x_axis(x):.1f}", f"{y_axis(y):.1f}"
            out.append(f'<circle cx="{place[0]}" cy="{place[1]}" r="4" fill="{COLOURS[3]}"/>')
            out.append(f'<text x="{x_axis(x) + 6:.1f}" y="{y_axis(y) - 6:.1f}">{_text(name)}</text>')
        middle = (left + right) / 2, (top + bottom) / 2
        out.append(f'<text x="{middle[0]}" y="{bottom + 33:.1f}" text-anchor="middle">{_text(self.x_label)}</text>')
        turned = f'transform="rotate(-90 14 {middle[1]:.1f})"'
        out.append(f'<text x="14" y="{middle[1]:.1f}" text-anchor="middle" {turned}>{_text(self.y_label)}</text>')
        return "\n".join([*out, "</svg>"])

    def _placeable(self, point: tuple[float, float]) -> bool:
        return is_placeable(point[0], "x" in self.log) and is_placeable(point[1], "y" in self.log)


@dataclass
class Bars:
    """One horizontal bar for each item, stacked from parts: (label, [(part, value), ...])."""

    title: str
    unit: str
    items: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    limit: tuple[str, float] | None = None
    """A line to compare with: (what, value)."""

    def svg(self) -> str:
        """The plot, 840 units wide."""
        colour = _colours([name for _, parts in self.items for name, value in parts if value > 0])
        totals = [sum(value for _, value in parts) for _, parts in self.items]
        longest = max([*totals, self.limit[1] if self.limit else 0.0]) or 1.0
        left, width, row = 190.0, 560.0, 30.0
        legend = _Legend(left, left + width)
        legend.add([(name.replace("_", " "), colour[name], "") for name in colour])
        top = legend.bottom + 8
        out = [_open(left + width + 90, top + row * len(self.items) + 34, self.title), *legend.parts]
        for place, ((label, parts), total) in enumerate(zip(self.items, totals, strict=True)):
            y, at = top + row * place, left
            out.append(f'<text x="{left - 8}" y="{y + 16:.1f}" text-anchor="end">{_text(label)}</text>')
            for name, value in parts:
                if value > 0:
                    long = width * value / longest
                    title = f"{name.replace('_', ' ')}: {format_count(value)} {self.unit}"
                    out.append(
                        f'<rect x="{at:.1f}" y="{y + 2:.1f}" width="{long:.1f}" height="20" fill="{colour[name]}">'
                        f"<title>{_text(title)}</title></rect>"
                    )
                    at += long
            out.append(f'<text x="{at + 6:.1f}" y="{y + 16:.1f}">{format_count(total)} {_text(self.unit)}</text>')
        if self.limit:
            what, value = self.limit
            at, end = left + width * value / longest, top + row * len(self.items) + 8
            out.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 4:.1f}" y2="{end:.1f}" stroke="{COLOURS[3]}" '
                'stroke-dasharray="4 3"/>'
            )
            out.append(
                f'<text x="{at:.1f}" y="{end + 14:.1f}" text-anchor="end">{_text(what)} {format_count(value)}</text>'
            )
        return "\n".join([*out, "</svg>"])


def thin(points: Sequence[tuple[float, float]], limit: int = FEW_POINTS) -> Sequence[tuple[float, float]]:
    """At most `limit` points, keeping each group's lowest and highest so that no spike disappears."""
    if len(points) <= limit:
        return points
    size = ceil(2 * len(points) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        kept.extend(sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])}))
    return kept


class _Legend:
    """Swatches with names above a plot, in as many rows as they take."""

    def __init__(self, left: float, right: float) -> None:
        self.left, self.right = left, right
        self.x, self.y = left, 4.0
        self.parts: list[str] = []

    @property
    def bottom(self) -> float:
        return self.y + 16 if self.parts else 0.0

    def add(self, items: Sequence[tuple[str, str, str]]) -> None:
        """(name, colour, how it is drawn: a line, a dashed one of this pattern, or "band")."""
        for name, colour, look in items:
            width = 34 + LETTER * len(name)
            if self.x + width > self.right and self.x > self.left:
                self.x, self.y = self.left, self.y + 18
            if look == "band":
                shape = f'<rect x="{self.x:.1f}" y="{self.y}" width="16" height="12" fill="{colour}" opacity="0.3"/>'
            else:
                shape = (
                    f'<line x1="{self.x:.1f}" x2="{self.x + 16:.1f}" y1="{self.y + 6}" y2="{self.y + 6}" '
                    f'stroke="{colour}" stroke-width="{2 if look else 4}" stroke-dasharray="{look or "none"}"/>'
                )
            self.parts.append(shape)
            self.parts.append(f'<text x="{self.x + 21:.1f}" y="{self.y + 10}">{_text(name)}</text>')
            self.x += width


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def _open(width: float, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_text(title)}">'


def _rule(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" class="grid"/>'


def _axis_number(value: float) -> str:
    return (
        f"{value:.4g}"
        if 1e-3 <= abs(value) < 1e4 or value == 0
        else format_count(value, 4)
        if value >= 1e4
        else f"{value:.0e}"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
