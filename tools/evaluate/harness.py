"""Runs lm-eval itself on a model of ours."""

import argparse
import importlib
import sys

from megalm.config.errors import ConfigError

HELP = "run lm-eval on a model of ours: any of its tasks; the words after the model are lm-eval's own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run's folder, a checkpoint, or a folder of another library's")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="for lm-eval: --tasks mine --include_path tasks/ ...")


def run(args: argparse.Namespace) -> int:
    """Errors: ConfigError where lm-eval is not installed."""
    try:
        harness = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install megalm[eval]") from None
    importlib.import_module("megalm.evaluate.lm_eval_model")
    before, sys.argv = sys.argv, ["lm_eval", "--model", "megalm", "--model_args", f"path={args.model}", *args.words]
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before
    return 0
