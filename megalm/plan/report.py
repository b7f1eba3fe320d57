"""An answer of the planner: data for programs, tables for the terminal, a page with plots for a browser."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from megalm.config import ConfigError
from megalm.plan.render import console, grid, number


@dataclass
class Table:
    """Rows under headers; units belong in the headers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str | None = None


@dataclass
class Bars:
    """A plot: one horizontal bar for each item, or one stacked from parts."""

    title: str
    unit: str
    items: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    """(label, [(part, value), ...])"""
    limit: tuple[str, float] | None = None
    """A line to compare with: (what, value)."""


@dataclass
class Curves:
    """A plot of y over x; both axes logarithmic where `log` says so."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    log: str = "xy"
    points: Sequence[tuple[str, float, float]] = ()


@dataclass
class Report:
    """Everything a subcommand answers."""

    title: str
    data: dict[str, Any]
    blocks: list[Table | Bars | Curves | str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def show(self, *, as_json: bool = False, page: str | None = None) -> int:
        """Print tables (or JSON), and write the page when asked for."""
        if page:
            try:
                Path(page).write_text(self.page(), encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--html {page}: cannot be written ({error.strerror}).") from None
        if as_json:
            print(json.dumps({**self.data, **({"warnings": self.warnings} if self.warnings else {})}, indent=2))
            return 0
        terminal = console()
        for block in self.blocks:
            if isinstance(block, Table):
                terminal.print(grid(block.title, block.headers, block.rows))
                if block.note:
                    terminal.print(f"  {block.note}\n", style="dim", markup=False)
            elif isinstance(block, str):
                terminal.print(f"  {block}", markup=False)
        for warning in self.warnings:
            terminal.print(f"warning: {warning}", style="yellow", markup=False)
        if page:
            terminal.print(f"wrote {page}")
        return 0

    def page(self) -> str:
        """One self-contained HTML page: tables and SVG plots, no script."""
        parts = []
        for block in self.blocks:
            if isinstance(block, Table):
                parts.append(_table(block))
            elif isinstance(block, Bars):
                parts.append(f"<figure><figcaption>{_text(block.title)}</figcaption>{bars(block)}</figure>")
            elif isinstance(block, Curves):
                parts.append(f"<figure><figcaption>{_text(block.title)}</figcaption>{curves(block)}</figure>")
            else:
                parts.append(f"<p>{_text(block)}</p>")
        parts += [f"<p class=warning>warning: {_text(warning)}</p>" for warning in self.warnings]
        return _PAGE.replace("TITLE", _text(self.title)).replace("BODY", "\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width">
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fff}
h1{font-size:1.4rem}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}th,td{padding:.2rem .7rem;border-bottom:1px solid #dde3ea}
th{text-align:left;background:#f3f6f9}td.n{text-align:right}figure{margin:1.5rem 0}figcaption{font-weight:600}
svg{max-width:100%;height:auto}.warning{color:#9a5b00}small{color:#5b6875}
@media(prefers-color-scheme:dark){body{color:#dfe6ee;background:#14191f}th{background:#1f2831}th,td{border-color:#33404d}
svg text{fill:#dfe6ee}}
</style>
<h1>TITLE</h1>
BODY
</html>
"""
_COLOURS = ("#3b6fb6", "#e08a2e", "#4f9d69", "#b6524f", "#8063ab", "#4aa3a8", "#c9a227", "#7d8894")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(header)}</th>" for header in table.headers)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    note = f"<small>{_text(table.note)}</small>" if table.note else ""
    return f"<table><caption>{_text(table.title)}</caption><tr>{head}</tr>{body}</table>{note}"


def _cell(value: Any) -> str:
    text = str(value)
    numeric = text[:1] in "+-$0123456789." and text[:1] != ""
    return f"<td{' class=n' if numeric else ''}>{_text(text)}</td>"


def bars(plot: Bars) -> str:
    """Stacked horizontal bars as SVG."""
    names = list(dict.fromkeys(name for _, parts in plot.items for name, value in parts if value > 0))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    top = max([sum(value for _, value in parts) for _, parts in plot.items] + [plot.limit[1] if plot.limit else 0.0])
    top = top or 1.0
    left, width, row = 190, 560, 30
    legend = row * ceil(len(names) / 4) + 6
    height = legend + row * len(plot.items) + 34
    out = [
        f'<svg viewBox="0 0 {left + width + 90} {height}" role="img" font-size="13" font-family="system-ui,sans-serif">'
    ]
    for i, name in enumerate(names):
        x, y = left + 150 * (i % 4), 6 + row * (i // 4)
        out.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour[name]}"/>')
        out.append(f'<text x="{x + 17}" y="{y + 11}">{_text(name.replace("_", " "))}</text>')
    for i, (label, parts) in enumerate(plot.items):
        y, at = legend + row * i, float(left)
        out.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{_text(label)}</text>')
        for name, value in parts:
            if value <= 0:
                continue
            long = width * value / top
            title = f"{name.replace('_', ' ')}: {number(value)} {plot.unit}"
            out.append(
                f'<rect x="{at:.1f}" y="{y + 2}" width="{long:.1f}" height="20" fill="{colour[name]}">'
                f"<title>{_text(title)}</title></rect>"
            )
            at += long
        total = sum(value for _, value in parts)
        out.append(f'<text x="{at + 6:.1f}" y="{y + 16}">{number(total)} {_text(plot.unit)}</text>')
    if plot.limit:
        at = left + width * plot.limit[1] / top
        end = height - 24
        out.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{legend - 4}" y2="{end}" stroke="#b6524f" stroke-dasharray="4 3"/>'
        )
        out.append(
            f'<text x="{at:.1f}" y="{end + 14}" text-anchor="end">{_text(plot.limit[0])} {number(plot.limit[1])}</text>'
        )
    out.append("</svg>")
    return "".join(out)


def curves(plot: Curves) -> str:
    """Lines over two axes as SVG."""
    everything = [point for _, line in plot.series for point in line] + [(x, y) for _, x, y in plot.points]
    everything = [(x, y) for x, y in everything if _placeable(x, "x" in plot.log) and _placeable(y, "y" in plot.log)]
    if not everything:
        return ""
    left, top, width, height = 80, 14, 640, 340
    x_axis = _Axis([x for x, _ in everything], "x" in plot.log, left, left + width)
    y_axis = _Axis([y for _, y in everything], "y" in plot.log, top + height, top)
    out = [
        f'<svg viewBox="0 0 {left + width + 150} {top + height + 50}" role="img" font-size="12"'
        ' font-family="system-ui,sans-serif">'
    ]
    for value in x_axis.ticks():
        at = x_axis(value)
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + height}" stroke="#8884"/>')
        out.append(f'<text x="{at:.1f}" y="{top + height + 16}" text-anchor="middle">{number(value)}</text>')
    for value in y_axis.ticks():
        at = y_axis(value)
        out.append(f'<line x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#8884"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for i, (name, line) in enumerate(plot.series):
        shade = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in line if (x, y) in set(everything))
        out.append(f'<polyline points="{path}" fill="none" stroke="{shade}" stroke-width="2"/>')
        out.append(f'<rect x="{left + width + 10}" y="{top + 18 * i}" width="12" height="12" fill="{shade}"/>')
        out.append(f'<text x="{left + width + 27}" y="{top + 18 * i + 11}">{_text(name)}</text>')
    for name, x, y in plot.points:
        out.append(
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="4" fill="#b6524f"><title>{_text(name)}</title></circle>'
        )
        out.append(f'<text x="{x_axis(x) + 6:.1f}" y="{y_axis(y) - 6:.1f}">{_text(name)}</text>')
    out.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">{_text(plot.x_label)}</text>'
    )
    middle = top + height / 2
    out.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{_text(plot.y_label)}</text>'
    )
    out.append("</svg>")
    return "".join(out)


def _placeable(value: float, logarithmic: bool) -> bool:
    return value == value and abs(value) != float("inf") and (value > 0 or not logarithmic)


class _Axis:
    """Maps values to pixels."""

    def __init__(self, values: list[float], logarithmic: bool, start: float, end: float) -> None:
        self.logarithmic, self.start, self.end = logarithmic, start, end
        low, high = min(map(self._position, values)), max(map(self._position, values))
        margin = (high - low) * 0.05 or 0.5
        self.low, self.high = low - margin, high + margin

    def _position(self, value: float) -> float:
        return log10(value) if self.logarithmic else value

    def __call__(self, value: float) -> float:
        share = (self._position(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(ceil(self.low), floor(self.high) + 1)
            steps = (1, 2, 5) if len(decades) < 3 else (1,)
            every = [10.0**d * s for d in range(floor(self.low), floor(self.high) + 1) for s in steps]
            return [tick for tick in every if self.low <= log10(tick) <= self.high]
        step = 10.0 ** floor(log10((self.high - self.low) / 4))
        step *= next(s for s in (1, 2, 5, 10) if (self.high - self.low) / (step * s) <= 8)
        first = ceil(self.low / step)
        return [step * i for i in range(first, floor(self.high / step) + 1)]
