"""Muon beside AdamW: held-out loss at the end of the schedule, each at several learning rates and seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.journal import read_course

HELP = "held-out loss of AdamW and Muon at the end of the schedule, by learning rate and seed"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, model and the sweep."""
    parser.add_argument("--data", required=True, metavar="PREFIX", help="token file, such as data/python_text_document")
    parser.add_argument("--tokenizer", metavar="FILE", help="its tokenizer (default: none, ids alone)")
    parser.add_argument("--rules", nargs="+", default=["adamw", "muon"], metavar="NAME")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-muon"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("overrides", nargs="*", help="further words of the run, such as train.global_batch_size=32")


def run(args: argparse.Namespace) -> int:
    """Train every combination and print the table. Errors: ConfigError where a run fails."""
    table: dict[str, dict[str, list[float]]] = {}
    for rule in args.rules:
        for rate in args.rates:
            losses = [_held_out(args, rule, rate, seed) for seed in args.seeds]
            table.setdefault(rule, {})[f"{rate:g}"] = losses
            print(f"{rule:8} lr {rate:<8g} {_words(losses)}", flush=True)
    best = {rule: min(rates.items(), key=lambda item: statistics.fmean(item[1])) for rule, rates in table.items()}
    for rule, (rate, losses) in best.items():
        print(f"best of {rule}: lr {rate}, {_words(losses)}")
    result = {"steps": args.steps, "seeds": args.seeds, "words": args.overrides, "held_out_loss": table}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _held_out(args: argparse.Namespace, rule: str, rate: float, seed: int) -> float:
    name = f"{rule}-{rate:g}-{seed}-{args.steps}"
    words = [
        "+model=tiny", f"optim={rule}", f"optim.lr={rate!r}", f"train.seed={seed}", f"train.steps={args.steps}",
        f"data.train={args.data}", f"data.tokenizer={args.tokenizer or 'null'}", f"run.dir={args.work}", f"run.name={name}",
        "train.sample=false", "train.eval_every=0", "checkpoint.keep=1", *args.overrides,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "megalm.launch", *words], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{name} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    steps: list[dict[str, Any]] = read_course(args.work / name / "metrics.jsonl").steps
    return next(step["eval/loss"] for step in reversed(steps) if "eval/loss" in step)


def _words(losses: list[float]) -> str:
    spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"held-out loss {statistics.fmean(losses):.4f}{spread} ({', '.join(f'{loss:.4f}' for loss in losses)})"
