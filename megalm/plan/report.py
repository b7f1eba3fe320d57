"""An answer of the planner: data for programs, tables for the terminal, a page with plots for a browser."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config import ConfigError
from megalm.page.document import Caution, Table, render_page
from megalm.page.plots import Bars, Lines
from megalm.plan.render import make_console, make_grid


@dataclass
class Report:
    """Everything a subcommand answers."""

    title: str
    data: dict[str, Any]
    blocks: list[Table | Bars | Lines | str] = field(default_factory=list)
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
        terminal = make_console()
        for block in self.blocks:
            if isinstance(block, Table):
                terminal.print(make_grid(block.title, block.headers, block.rows))
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
        return render_page(self.title, [*self.blocks, *map(Caution, self.warnings)])
