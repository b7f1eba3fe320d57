"""Asks a suite of a model."""

import argparse
import sys
from pathlib import Path

from megalm.checkpoint.errors import CheckpointError
from megalm.config.errors import ConfigError
from megalm.evaluate.evaluation import Model, evaluate
from megalm.evaluate.measure import TaskResult
from megalm.evaluate.protocols import PROTOCOLS
from megalm.evaluate.results import average
from megalm.evaluate.scoring import TOKENS
from megalm.evaluate.statistics import Estimate
from megalm.evaluate.tasks.suite import DATA, list_suites, read_suite
from megalm.evaluate.written import MARKERS, Code, Marker

from ..model_options import add_device_arguments, choose_device

HELP = "ask a suite of a model (what `megalm evaluate MODEL` does)"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a run's folder, a checkpoint, or a folder of another library's")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file (default: the model's own)")
    parser.add_argument(
        "--accept", action="append", default=[], metavar="KEY", help="a setting of config.json that may be passed over"
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--batch-tokens", type=int, default=TOKENS, help=f"tokens of one forward pass (default {TOKENS})"
    )


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        default="smoke",
        help=f"{', '.join(list_suites())}, or a file: a suite's or an lm-eval task's .yaml, or .jsonl (default smoke)",
    )
    parser.add_argument("--task", action="append", default=[], help="only this task; may be given several times")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, help="how it is asked and scored (default: the one the suite is meant for)"
    )
    parser.add_argument("--data", type=Path, default=DATA, help=f"where fetched sets lie (default {DATA})")
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run the programs that the model writes, shut in, where a task tests them",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_suite_arguments(parser)
    parser.add_argument("--limit", type=int, help="only the first items of each task")
    parser.add_argument("--output", type=Path, help="folder of the results (default: evaluation/... in the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def choose_markers(args: argparse.Namespace) -> dict[str, Marker]:
    """Who judges what is written; programs are run where that was asked for."""
    return {**MARKERS, "code": Code()} if args.run_code else MARKERS


def load(args: argparse.Namespace) -> Model:
    """Load the model that the arguments name."""
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens={args.batch_tokens} must be at least 1")
    try:
        model = Model.load(
            args.model,
            tokenizer=args.tokenizer,
            device=choose_device(args.device),
            dtype=args.dtype,
            accept=args.accept,
            tokens=args.batch_tokens,
        )
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    for note in (*model.source.notes, *model.tokenizer.control.doubts):
        print(f"note: {note}", file=sys.stderr)
    return model


def run(args: argparse.Namespace) -> int:
    """Print each task as it is done. Errors: ConfigError for what cannot be asked."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit={args.limit} must be at least 1")
    suite = read_suite(args.suite, args.data, args.task)
    model = load(args)
    speak = not args.json
    if speak:
        print(f"{suite.name} by the protocol {args.protocol or suite.protocol}, {args.dtype}\n")
        print(f"{'task':<28} {'shots':>5} {'items':>6} {'chance':>7}  figures (± standard error)")
    found = evaluate(
        model,
        suite,
        args.protocol,
        output=args.output,
        limit=args.limit,
        markers=choose_markers(args),
        on_task=lambda result, reused: print(describe(result, reused), flush=True) if speak else None,
    )
    averages = average(found.results)
    if args.json:
        print((found.folder / "results.json").read_text(encoding="utf-8"), end="")
        return 0
    for name, figure in averages.items():
        print(f"{name:<28} {'':>5} {'':>6} {'':>7}  above chance {show(figure)}")
    print(f"\n{found.seconds:.1f} s; {found.folder}/results.json")
    return 0


def describe(result: TaskResult, reused: bool = False) -> str:
    """Describe a task's line."""
    chance = "" if result.kind not in ("choice", "schema") else f"{result.baseline:.3f}"
    figures = "  ".join(f"{name} {show(figure)}" for name, figure in result.figures.items())
    return f"{result.task:<28} {result.num_fewshot:>5} {len(result.outcomes):>6} {chance:>7}  {figures}" + (
        "  (from before)" if reused else ""
    )


def show(figure: Estimate) -> str:
    """0.412 ± 0.031"""
    form = ".3f" if abs(figure.value) < 1000 else ".3g"
    error = "" if figure.error is None else f" ± {figure.error:{form}}"
    return f"{figure.value:{form}}{error}"
