"""Looks for faults in a test's items."""

import argparse
import json
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.evaluate.lint import Linted, lint_file, lint_task
from megalm.evaluate.pages import render_findings
from megalm.evaluate.tasks.suite import DATA, list_suites, read_suite

HELP = "look for faults in a test: bias, repeated and equal choices, answers that give themselves away"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="+", help=".jsonl files, suites' or lm-eval tasks' .yaml, or names of suites")
    parser.add_argument("--data", type=Path, default=DATA, help=f"where fetched sets lie (default {DATA})")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also write a page on which the items can be read")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def lint(name: str, data: Path) -> list[Linted]:
    """The tasks that a word names."""
    if name.endswith(".jsonl"):
        return [lint_file(Path(name))]
    tasks = read_suite(name, data).tasks if name.endswith((".yaml", ".yml")) or name in list_suites() else None
    if tasks is None:
        raise ConfigError(f"{name}: give a .jsonl file, a .yaml, or one of {', '.join(list_suites())}")
    return [Linted(task.name, task.kind, list(task.items), lint_task(task)) for task in tasks]


def run(args: argparse.Namespace) -> int:
    """Print the findings. Exit status 0, also where there are some."""
    linted = [one for name in args.file for one in lint(name, args.data)]
    if args.html is not None:
        with explain_failed_writes(args.html.parent, key="--html"):
            write_whole(args.html, render_findings(linted))
    if args.json:
        print(json.dumps([one.as_dict() for one in linted], indent=2))
        return 0
    for one in linted:
        print(f"{one.name}: {one.kind}, {len(one.items)} items" + ("" if one.findings else ", nothing found"))
        for finding in one.findings:
            where = ", ".join(map(str, finding.items[:8])) + (", ..." if len(finding.items) > 8 else "")
            print(f"  {finding.check:<26} {finding.text}" + (f" (items {where})" if where else ""))
    return 0
