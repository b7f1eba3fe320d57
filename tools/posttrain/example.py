"""Writes a small instruction set with verifiable sums, and a tokenizer for it."""

import argparse
from pathlib import Path

from megalm.posttrain.example import write_example

HELP = "write a small instruction set and verifiable sums, made by a program: what `make chat` learns"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="that the files are written to")
    parser.add_argument(
        "--seed", type=int, default=0, help="another one gives other instructions (default %(default)s)"
    )
    parser.add_argument(
        "--instructions", type=int, default=4000, metavar="N", help="conversations (default %(default)s)"
    )
    parser.add_argument(
        "--guesses", type=float, default=0.25, metavar="SHARE",
        help="conversations that are sums with a guess for an answer, which show its form alone (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the files, and name them."""
    made = write_example(args.folder, seed=args.seed, instructions=args.instructions, guesses=args.guesses)
    for name, path in vars(made).items():
        print(f"{name:<16}{path}")
    return 0
