"""Muon beside AdamW: held-out loss at the end of the schedule, each at several learning rates and seeds."""

from __future__ import annotations

import argparse
import json
import statistics

from ._losses import add_run_arguments, show_losses, train

HELP = "held-out loss of AdamW and Muon at the end of the schedule, by learning rate and seed"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep, and the runs."""
    parser.add_argument("--rules", nargs="+", default=["adamw", "muon"], metavar="NAME")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR")
    add_run_arguments(parser, steps=1000, work="runs/bench-muon")


def run(args: argparse.Namespace) -> int:
    """Train every combination and print the table. Errors: ConfigError where a run fails."""
    table: dict[str, dict[str, list[float]]] = {}
    for rule in args.rules:
        for rate in args.rates:
            losses = [_measure_held_out(args, rule, rate, seed) for seed in args.seeds]
            table.setdefault(rule, {})[f"{rate:g}"] = losses
            print(f"{rule:8} lr {rate:<8g} held-out loss {show_losses(losses)}", flush=True)
    best = {rule: min(rates.items(), key=lambda item: statistics.fmean(item[1])) for rule, rates in table.items()}
    for rule, (rate, losses) in best.items():
        print(f"best of {rule}: lr {rate}, held-out loss {show_losses(losses)}")
    result = {"steps": args.steps, "seeds": args.seeds, "words": args.overrides, "held_out_loss": table}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure_held_out(args: argparse.Namespace, rule: str, rate: float, seed: int) -> float:
    name = f"{rule}-{rate:g}-{seed}-{args.steps}"
    steps = train(args, name, [f"optim={rule}", f"optim.lr={rate!r}", f"train.seed={seed}"])
    return float(next(step["eval/loss"] for step in reversed(steps) if "eval/loss" in step))
