"""Numbers and tables for people, in the terminal."""

from collections.abc import Sequence
from typing import Any

from megalm.page.document import is_number


def format_duration(seconds: float | None) -> str:
    """Seconds in the unit that people would use."""
    if seconds is None:
        return "-"
    if seconds == float("inf"):
        return "never"
    for limit, unit in ((2 * 86400, "days"), (2 * 3600, "hours"), (120, "minutes")):
        if seconds >= limit:
            return f"{seconds / {'days': 86400, 'hours': 3600, 'minutes': 60}[unit]:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def format_gib(value: float) -> str:
    """Bytes as GiB, or MiB when small."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def format_dollars(value: float | None) -> str:
    """Dollars without cents from ten on."""
    if value is None:
        return "-"
    return f"${value:,.0f}" if value >= 10 else f"${value:,.2f}"


def make_grid(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """Make a rich table: first column to the left, the others to the right; units belong in the headers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left")
    numeric = [all(is_number(row[i]) for row in rows) for i in range(len(headers))]
    for header, right in zip(headers, numeric, strict=True):
        table.add_column(header, justify="right" if right else "left")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    return table


def make_console(width: int | None = None) -> Any:
    """Make a rich console that does not wrap tables when the output is a file."""
    import sys

    from rich.console import Console

    return Console(width=width or (None if sys.stdout.isatty() else 140), highlight=False)
