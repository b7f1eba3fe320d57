"""Command line of `megalm compare`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.observe.runs import (
    find_runs,
    rank,
    summarize,
    tabulate_comparison,
    write_comparison_json,
    write_comparison_page,
)

from ..arguments import ArgumentParser
from ..subcommands import run_reporting

EPILOG = """examples:
  megalm compare runs/a runs/b
  megalm compare runs/sweep --html compare.html
  megalm compare runs --by tokens_per_s --highest
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the arguments."""
    made = ArgumentParser(
        prog="megalm compare",
        description="Compare runs: what differs in their settings, what each came to, the best first.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("run", nargs="+", type=Path, help="folders of runs, or folders that hold runs")
    made.add_argument(
        "--by", metavar="METRIC", help="what decides (default: eval/loss, else the mean loss of 50 steps)"
    )
    made.add_argument("--highest", action="store_true", help="more of the metric is better")
    made.add_argument("--html", type=Path, metavar="PAGE", help="also write a page with the curves over each other")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def run(args: argparse.Namespace) -> int:
    """Print the comparison. Errors: ConfigError for what is no run."""
    metric, runs = rank([summarize(folder) for folder in find_runs(args.run)], args.by, args.highest)
    if args.html is not None:
        if args.html.is_dir():
            raise ConfigError(f"--html {args.html}: is a folder. Give the name of a page.")
        with explain_failed_writes(args.html.parent):
            write_whole(args.html, write_comparison_page(runs, metric, args.highest))
    if args.json:
        print(write_comparison_json(runs, metric))
        return 0
    headers, rows = tabulate_comparison(runs, metric)
    table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    for column, header in zip(table.columns, headers, strict=True):
        column.justify = "left" if header == "run" else "right"
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(f"best by {'highest' if args.highest else 'lowest'} {metric}: {runs[0].folder}", highlight=False)
    if args.html is not None:
        console.print(f"wrote {args.html}", highlight=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    return run_reporting(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
