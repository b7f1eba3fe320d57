"""Says what people preferred."""

import argparse
import json
from pathlib import Path

from megalm.evaluate.pairs import read_pairs, read_votes, tally

HELP = "count people's votes: win rate with its interval, agreement, strengths with style beside them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where megalm evaluate pairs wrote the pairs")
    parser.add_argument("votes", nargs="+", type=Path, help="files that the page saved, one a person")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Errors: ConfigError for files that are no votes on these pairs."""
    pairs = read_pairs(args.folder)
    found = tally(pairs, [read_votes(path, pairs) for path in args.votes])
    told = found.as_dict()
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    first, second = found.models
    print(f"{first} against {second}: {found.wins[0]:.0f} won, {found.wins[1]:.0f} lost, {found.ties} ties")
    print(f"share, ties half: {told['share']:.1%}, 95% interval {found.interval[0]:.1%} to {found.interval[1]:.1%}")
    for name, value in (
        ("agree with themselves on repeated pairs", found.agreement),
        ("see the shuffled side", found.attentive),
        ("agreement of two people beyond chance (kappa)", found.kappa),
    ):
        print(f"{name}: " + ("-" if value is None else f"{value:.2f}"))
    gap = found.strengths.values[0] - found.strengths.values[1]
    style = ", ".join(f"{name} {value:+.2f}" for name, value in found.strengths.style.items())
    print(f"log odds at equal style: {gap:+.2f}; what style adds: {style}")
    return 0
