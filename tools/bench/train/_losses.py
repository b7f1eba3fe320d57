"""Runs of one small model that differ in a few words, and what their losses come to."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.journal import read_course


def add_run_arguments(parser: argparse.ArgumentParser, *, steps: int, work: str) -> None:
    """Data, seeds, length and place of the runs."""
    parser.add_argument("--data", required=True, metavar="PREFIX", help="token file, such as data/python_text_document")
    parser.add_argument("--tokenizer", metavar="FILE", help="its tokenizer (default: none, ids alone)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--steps", type=int, default=steps, metavar="N")
    parser.add_argument("--work", type=Path, default=Path(work), metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("overrides", nargs="*", help="further words of the runs, such as train.global_batch_size=32")


def train(args: argparse.Namespace, name: str, words: Sequence[str]) -> list[dict[str, Any]]:
    """Train the 5M model with these words; gives the steps' records. A run that is complete is not made again.

    Errors: ConfigError where it fails.
    """
    given = [
        "+model=tiny", f"train.steps={args.steps}", f"data.train={args.data}", f"data.tokenizer={args.tokenizer or 'null'}",
        f"run.dir={args.work}", f"run.name={name}", "train.sample=false", "train.eval_every=0", "checkpoint.keep=1", *words,
        *args.overrides,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "megalm.launch", *given], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{name} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    steps: list[dict[str, Any]] = read_course(args.work / name / "metrics.jsonl").steps
    return steps


def show_losses(losses: Sequence[float]) -> str:
    """Their mean, spread and each."""
    spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{spread} ({', '.join(f'{loss:.4f}' for loss in losses)})"
