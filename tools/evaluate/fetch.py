"""Brings public test sets to this machine."""

import argparse
from pathlib import Path

from megalm.evaluate.fetch import FETCHED, fetch
from megalm.evaluate.tasks.suite import DATA

HELP = "bring a suite's public sets to this machine, with checksums"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=FETCHED)
    parser.add_argument("--data", type=Path, default=DATA, help=f"where they go (default {DATA})")
    parser.add_argument(
        "--from",
        type=Path,
        dest="given",
        metavar="PATH",
        help="the downloaded file, or a folder of such, where there is no network",
    )


def run(args: argparse.Namespace) -> int:
    fetch(args.suite, args.data, args.given)
    return 0
