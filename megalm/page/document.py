"""The page around plots and tables."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalm.page.plots import Bars, Lines

STYLE = """
:root{--ink:#1d2733;--soft:#5b6875;--paper:#fff;--head:#f3f6f9;--rule:#dde3ea;--warn:#9a5b00}
@media(prefers-color-scheme:dark){:root{--ink:#dfe6ee;--soft:#9aa8b6;--paper:#14191f;--head:#1f2831;--rule:#33404d;--warn:#e0a040}}
body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;margin:0 0 1rem}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--rule)}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}caption{text-align:left;font-weight:600}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{background:var(--head)}td.n{text-align:right}small{color:var(--soft)}.warning{color:var(--warn)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(34rem,100%),1fr));gap:.5rem 1.5rem}
figure{margin:.5rem 0}figcaption{font-weight:600}svg{width:100%;max-width:60rem;height:auto}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg .grid{stroke:var(--rule)}
svg .pale{stroke:var(--soft);opacity:.55;stroke-width:1}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;margin:0 0 1rem}
dl div{background:var(--head);border-radius:6px;padding:.5rem .8rem}dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
pre{background:var(--head);padding:.8rem;overflow:auto;border-radius:6px;white-space:pre-wrap;font-size:13px}
summary{cursor:pointer;color:var(--soft)}i.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
"""


@dataclass
class Table:
    """Rows under headers; units belong in the headers. A cell that is a `Fold` or a `Dot` is drawn as that."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str | None = None


@dataclass(frozen=True)
class Dot:
    """A word with a coloured dot before it."""

    text: str
    colour: str


@dataclass(frozen=True)
class Fold:
    """Preformatted text behind a title that opens it."""

    title: str
    text: str
    opened: bool = False


@dataclass(frozen=True)
class Facts:
    """A few numbers to see first: name to value."""

    values: dict[str, str]


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Caution:
    """A sentence to be noticed."""

    text: str


Block = Table | Lines | Bars | Fold | Facts | Heading | Caution | str


def render_page(title: str, blocks: Sequence[Block]) -> str:
    """One self-contained HTML page; plots that follow each other stand side by side where there is room."""
    parts: list[str] = []
    plots = False
    for block in blocks:
        is_plot = isinstance(block, Lines | Bars)
        if is_plot != plots:
            parts.append("<div class=plots>" if is_plot else "</div>")
            plots = is_plot
        parts.append(_block(block))
    if plots:
        parts.append("</div>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n'
        f"<h1>{_text(title)}</h1>\n{body}\n</html>\n"
    )


def _block(block: Block) -> str:
    if isinstance(block, Lines | Bars):
        return f"<figure><figcaption>{_text(block.title)}</figcaption>{block.svg()}</figure>"
    if isinstance(block, Table):
        numeric = [all(is_number(row[i]) for row in block.rows) for i in range(len(block.headers))]
        head = "".join(f"<th>{_text(header)}</th>" for header in block.headers)
        body = "".join("<tr>" + "".join(map(_cell, row, numeric)) + "</tr>" for row in block.rows)
        note = f"<small>{_text(block.note)}</small>" if block.note else ""
        return f"<table><caption>{_text(block.title)}</caption><tr>{head}</tr>{body}</table>{note}"
    if isinstance(block, Fold):
        return _fold(block)
    if isinstance(block, Facts):
        return (
            "<dl>"
            + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in block.values.items())
            + "</dl>"
        )
    if isinstance(block, Heading):
        return f"<h2>{_text(block.text)}</h2>"
    if isinstance(block, Caution):
        return f"<p class=warning>warning: {_text(block.text)}</p>"
    return f"<p>{_text(block)}</p>"


def _fold(fold: Fold) -> str:
    opened = " open" if fold.opened else ""
    return f"<details{opened}><summary>{_text(fold.title)}</summary><pre>{_text(fold.text)}</pre></details>"


def is_number(cell: Any) -> bool:
    """Whether a table's cell is a number, or nothing: columns of them stand to the right."""
    text = str(cell).strip()
    return not text or text == "-" or text[0] in "+-$<~0123456789."


def _cell(value: Any, numeric: bool) -> str:
    if isinstance(value, Fold):
        return f"<td>{_fold(value)}</td>"
    if isinstance(value, Dot):
        return f'<td><i class=dot style="background:{value.colour}"></i>{_text(value.text)}</td>'
    return f"<td{' class=n' if numeric else ''}>{_text(value)}</td>"


def _text(value: Any) -> str:
    return html.escape(str(value))
