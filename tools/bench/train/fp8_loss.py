"""What products in 8-bit floats cost in loss: the recipes beside bf16, over several seeds."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass

from megalm.config.precision import RECIPES

from ._losses import add_run_arguments, show_losses, train

HELP = "loss of 8-bit recipes beside bf16 at the end of a run, over several seeds"
LARGEST_SHARE = 0.0025
"""Of the loss, that 8-bit products may cost (what DeepSeek-V3 reports to stay below, arXiv:2412.19437, sec. 3.3)."""


@dataclass(frozen=True)
class Verdict:
    """A recipe's losses beside those of bf16, seed by seed."""

    difference: float
    """Of the means."""
    spread: float
    """Standard deviation of bf16's losses over the seeds."""
    share: float
    """The difference as a share of bf16's mean."""

    @property
    def holds(self) -> bool:
        """The difference lies within the seeds' own spread and below `LARGEST_SHARE`."""
        return abs(self.difference) <= self.spread and abs(self.share) <= LARGEST_SHARE


def judge(losses: list[float], wide: list[float]) -> Verdict:
    """Compare losses of the same seeds."""
    mean = statistics.fmean(wide)
    difference = statistics.fmean(losses) - mean
    return Verdict(difference, statistics.stdev(wide), difference / mean)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipes and the runs."""
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["tensorwise", "rowwise", "blockwise"])
    parser.add_argument(
        "--last", type=int, default=100, metavar="N", help="steps that the loss is the mean of (%(default)s)"
    )
    add_run_arguments(parser, steps=1000, work="runs/bench-fp8")


def run(args: argparse.Namespace) -> int:
    """Train, print and judge; 1 where a recipe costs more than it may. Errors: ConfigError where a run fails."""
    table: dict[str, list[float]] = {}
    verdicts: dict[str, Verdict] = {}
    for recipe in ("none", *args.recipes):
        table[recipe] = [_end_loss(args, recipe, seed) for seed in args.seeds]
        line = f"{'bf16' if recipe == 'none' else recipe:13} {show_losses(table[recipe])}"
        if recipe != "none" and len(args.seeds) > 1:
            found = verdicts[recipe] = judge(table[recipe], table["none"])
            line += f"  {found.difference:+.4f} ({found.share:+.3%}), the seeds' spread is {found.spread:.4f}: "
            line += "within it" if found.holds else "more than may be"
        print(line, flush=True)
    if args.out:
        result = {
            "steps": args.steps, "last": args.last, "seeds": args.seeds, "words": args.overrides,
            "loss": {("bf16" if recipe == "none" else recipe): losses for recipe, losses in table.items()},
            "verdicts": {recipe: {**vars(found), "holds": found.holds} for recipe, found in verdicts.items()},
        }  # fmt: skip
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(not all(found.holds for found in verdicts.values()))


def _end_loss(args: argparse.Namespace, recipe: str, seed: int) -> float:
    words = ["precision=bf16"] if recipe == "none" else ["precision=fp8", f"precision.fp8.recipe={recipe}"]
    steps = train(args, f"{recipe}-{seed}-{args.steps}", [*words, f"train.seed={seed}"])
    return statistics.fmean(step["loss"] for step in steps[-args.last :])
