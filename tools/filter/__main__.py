"""Command line of `megalm filter`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.files import write_whole

from ..arguments import ArgumentParser
from ..corpus_options import open_corpus, print_some
from ..engine_options import add_worker_arguments
from ..interruption import INTERRUPTED, interrupt_promptly
from ..subcommands import run_reporting
from ._train import make_training_parser, train

if TYPE_CHECKING:
    from megalm.corpus.dedup.corpus import Corpus
    from megalm.corpus.filter.job import Outcome
    from megalm.corpus.filter.rules import RuleSet


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input, 130 interrupted (the same command goes on)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers are the parallelism
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        training = make_training_parser().parse_args(words[1:])
        return run_reporting(lambda: train(training))
    args = make_parser().parse_args(words)
    with interrupt_promptly():
        status = run_reporting(lambda: run(args))
    if status == INTERRUPTED and (args.output or args.removed):
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    """Make the options."""
    parser = ArgumentParser(
        prog="megalm filter",
        description="Keep the documents that rules let through, with their scores. `--list` shows presets and scores; "
        "`megalm filter train` trains a classifier.",
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="files, folders, globs or URLs, as megalm tokenize takes them"
    )
    parser.add_argument(
        "--rules",
        action="append",
        default=[],
        metavar="NAME",
        help="a preset, or a yaml file of rules; several run one after another",
    )
    parser.add_argument("--list", action="store_true", help="show the presets and the scores that rules may ask for")
    parser.add_argument("--output", metavar="FILE", help="write the documents that stay here, as JSON lines")
    parser.add_argument(
        "--dropped",
        dest="removed",
        metavar="FILE",
        help="write place, rule, value and scores of the others here, as JSON lines",
    )
    parser.add_argument(
        "--statistics",
        metavar="PAGE.html",
        help="write a page with the distribution of each score, what limits would drop, and texts from both sides",
    )
    parser.add_argument(
        "--label-only", action="store_true", help="write all documents as they are, with what the rules say"
    )
    parser.add_argument(
        "--column",
        default="filter",
        metavar="KEY",
        help="key of what the rules say, in each document; '' for none (%(default)s)",
    )
    parser.add_argument("--field", default="text", help="key or column of the text (%(default)s)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out and list documents that cannot be read, instead of stopping"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="MB",
        help="that all processes of this machine may take together (default: 500 each)",
    )
    add_worker_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Filters, and prints what happened."""
    from megalm.corpus.filter.rules import list_presets, read_rules

    if args.list:
        return show_rules()
    if not args.inputs:
        raise ConfigError("give the INPUT that is to be filtered; --list shows the presets and scores.")
    if not args.rules:
        raise ConfigError(f"give --rules: a yaml file, or one of {', '.join(list_presets())}.")
    if args.label_only and not (args.output and args.column):
        raise ConfigError("--label-only writes what the rules say into the documents: give --output, and a --column.")
    return filter_inputs(args, read_rules(args.rules))


def filter_inputs(args: argparse.Namespace, contents: list[dict[str, Any]]) -> int:
    """Runs the rules over the inputs."""
    from megalm.corpus.filter.job import filter_documents
    from megalm.corpus.filter.rules import make_rules

    rules = make_rules(contents)  # wrong rules are told before anything is read
    watch = bool(args.statistics)
    options = {"rules": contents, "column": args.column, "label_only": args.label_only, "watch": watch}
    with open_corpus(args, "filter", **options) as corpus:
        outcome = filter_documents(corpus, contents, args.output, args.removed, args.column, args.label_only, watch)
        if watch:
            write_statistics(args.statistics, corpus, rules, outcome)
    print_outcome(args, outcome)
    return 0


def write_statistics(path: str, corpus: "Corpus", rules: "RuleSet", outcome: "Outcome") -> None:
    """Writes the page.

    Errors: ConfigError where it cannot be written.
    """
    from megalm.corpus.filter.statistics import describe_scores, gather_thresholds

    from ._page import render_statistics

    page = render_statistics(outcome, describe_scores(corpus, rules), gather_thresholds(corpus, rules))
    try:
        with write_whole(path) as file:
            file.write(page.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another place.") from error


def print_outcome(args: argparse.Namespace, outcome: "Outcome") -> None:
    """What stays, what each rule dropped, what could not be read."""
    if args.json:
        print(json.dumps(dataclasses.asdict(outcome)))
        return
    stays = outcome.documents - outcome.dropped
    share = stays / max(outcome.documents, 1)
    left = outcome.characters_left / max(outcome.characters, 1)
    print(f"{outcome.documents} documents, {stays} stay ({share:.1%}, {left:.1%} of the characters)")
    if outcome.changed:
        print(f"{outcome.changed} of them with another text than before")
    width = max((len(rule) for rule in outcome.by_rule), default=0)
    for rule, count in outcome.by_rule.items():
        if count:
            print(f"  {rule:<{width}}  {count:>10}  {count / outcome.documents:6.1%}")
    if outcome.bad:
        print(f"skipped as bad: {outcome.bad}")
        print_some(outcome.listed, outcome.bad, " (--dropped lists them all)")


def show_rules() -> int:
    """The presets, the scores of texts, and what edits give."""
    from megalm.corpus.filter.edits import LINE_COUNTS
    from megalm.corpus.filter.rules import describe_presets
    from megalm.corpus.filter.scores import SCORES

    print("Presets (--rules NAME):")
    for name, description in describe_presets().items():
        print(f"  {name:<20} {description}")
    print("\nScores (- score: NAME, with at_least and at_most):")
    for name, score in SCORES.items():
        print(f"  {name:<38} {score.help}")
    print(f"\nBehind `edit: clean_lines` also: {', '.join(LINE_COUNTS)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
