"""Compares models that were evaluated alike."""

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.evaluate.pages import compare_folders, compare_rows, render_comparison

HELP = "compare evaluated models: intervals, and paired tests against the first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders with a results.json, the one to compare with first"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also write a page")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the table. Errors: ConfigError for what cannot be compared."""
    if len(args.results) < 2:
        raise ConfigError("give at least two folders of results, such as runs/a/evaluation/smoke-core-step-100")
    names, compared = compare_folders(args.results)
    protocol = compared[0].results[0].protocol
    if args.html is not None:
        with explain_failed_writes(args.html.parent, key="--html"):
            write_whole(args.html, render_comparison(names, compared, protocol))
    if args.json:
        print(
            json.dumps(
                {
                    "protocol": protocol,
                    "models": names,
                    "tasks": [
                        {
                            "task": one.task,
                            "figure": one.figure,
                            "values": [result.figures[one.figure].as_dict() for result in one.results],
                            "against_first": [None if p is None else p._asdict() for p in one.against_first],
                        }
                        for one in compared
                    ],
                },
                indent=2,
            )
        )
        return 0
    table = Table("task", "figure", *names, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in compare_rows(compared):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(
        f"protocol {protocol}; ± is half of a 95% interval; p: against the first, item by item", highlight=False
    )
    return 0
