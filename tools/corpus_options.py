"""Options, progress and the last lines that the tools over documents share."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.dedup.removal import Removals, Written, write_lists
from megalm.corpus.dedup.stages import Progress
from megalm.corpus.engine import make_engine
from megalm.corpus.fields import unescape_template
from megalm.corpus.files import ENDINGS, LINE_ENDINGS, find_ending, name_compression
from megalm.corpus.results import Results

from .engine_options import add_worker_arguments

SHOWN = 20  # documents that could not be read and are printed; --json and --removed have more


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, globs or URLs, as tools/tokenize takes them"
    )
    add_result_arguments(parser)


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="write the documents that stay here, as JSON lines")
    parser.add_argument("--removed", metavar="FILE", help="write what was removed and why here, as JSON lines")
    parser.add_argument("--field", default="text", help="key or column of the text (%(default)s)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out and list documents that cannot be read, instead of stopping"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="MB",
        help="that all processes of this machine may take together: less means more and smaller parts on disk, the result "
        "is the same (default: 500 for each worker)",
    )
    add_worker_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


class ConsoleProgress(Progress):
    """A bar for each stage with the time left on a terminal, plain lines of the longer ones elsewhere; on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._total = self._done = self._started = self._spoken = 0.0

    def say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def start(self, stage: str, total: float) -> None:
        self._stage, self._total, self._done = stage, max(total, 1.0), 0.0
        self._started = self._spoken = time.monotonic()

    def advance(self, amount: float) -> None:
        self._done += amount
        now = time.monotonic()
        if sys.stderr.isatty():
            if self._bar is None and now - self._started < 0.2:  # most stages are over by then
                return
            self._on_bar()
        elif now - self._spoken > 5:
            self._spoken = now
            left = (now - self._started) * (self._total / max(self._done, 1e-9) - 1)
            self.say(f"{self._stage}: {self._done / self._total:.0%}, {left:.0f} s left")

    def _on_bar(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._total)
        self._bar.update(self._task, completed=self._done)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def check_targets(args: argparse.Namespace) -> None:
    """Makes the folders of the results.

    Errors: ConfigError if a result would be written over an input that is named itself, over the other one, under a name
    that is read as another format, or cannot be written there.
    """
    list_results(args).refuse_inputs(filter(os.path.isfile, args.inputs))
    for name in filter(None, (args.output, args.removed)):
        if "://" in name:
            raise ConfigError(f"{name}: results are written to files of this machine. Write them there, and copy them.")
        if name_compression(name) or find_ending(name) in {*ENDINGS} - {*LINE_ENDINGS, ".json"}:
            raise ConfigError(
                f"{name}: results are JSON lines, and a name with another ending is read as another format. Say .jsonl."
            )
        path = os.path.abspath(name)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"{name} is no file: give the result a name of its own.")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{name} cannot be written ({error.strerror}): choose another place.") from error
        if not os.access(os.path.dirname(path), os.W_OK):
            raise ConfigError(f"{name} cannot be written (its folder is read-only): choose another place.")
    if args.output and args.removed and os.path.realpath(args.output) == os.path.realpath(args.removed):
        raise ConfigError(f"--output and --removed are both {args.output}: give two files.")


def list_results(args: argparse.Namespace) -> Results:
    """List what the command writes."""
    target = args.output or args.removed
    return Results(tuple(filter(None, (args.output, args.removed))), (f"{target}.parts",) if target else ())


def parse_memory(args: argparse.Namespace) -> int | None:
    """`--memory` in bytes."""
    return None if args.memory is None else int(args.memory * 1e6)


@contextlib.contextmanager
def open_corpus(args: argparse.Namespace, command: str, **options: Any) -> Iterator[Corpus]:
    """Open the input, and what runs the stages over it; their files lie beside the result until the end. `options`: what
    else decides what the stages leave."""
    check_targets(args)
    target = args.output or args.removed
    with (
        make_engine(args.engine, args.workers, args.engine_address) as engine,
        Corpus(
            args.inputs,
            unescape_template(args.field),
            args.skip_bad,
            engine,
            f"{target}.parts" if target else None,
            (command, {"output": bool(args.output), "removed": bool(args.removed), **options}),
            ConsoleProgress(),
            parse_memory(args),
            list_results(args),
        ) as corpus,
    ):
        yield corpus


def finish(args: argparse.Namespace, corpus: Corpus, removals: Removals, more: dict[str, Any] | None = None) -> int:
    counts = write_lists(corpus, removals, args.output, args.removed)
    result = {"documents": counts.documents, "removed": counts.removed, "bad": counts.bad, **(more or {})}
    if args.json:
        print(json.dumps({**result, **report_unusual(counts.bad, counts.listed, counts.written)}))
        return 0
    share = counts.removed / max(counts.documents, 1)
    print(f"{counts.documents} documents, {counts.removed} to remove ({share:.1%})")
    for name, value in (more or {}).items():
        if value:
            print(f"{name.replace('_', ' ')}: {value}")
    print_unusual(counts.bad, counts.listed, counts.written)
    return 0


def report_unusual(bad: int, listed: Sequence[str], written: Written) -> dict[str, Any]:
    """What --json says besides, where there is something to say: what was skipped, and what was not written as it is."""
    found: dict[str, Any] = {"skipped": listed} if bad else {}
    if written.escaped:
        found["escaped"] = written.escaped
    if written.incomplete:
        found |= {"incomplete": written.incomplete, "incomplete_documents": written.listed}
    return found


def print_unusual(bad: int, listed: Sequence[str], written: Written) -> None:
    """How many documents could not be read, or not be written as they are, and the first of them."""
    if bad:
        print(f"skipped as bad: {bad}")
        print_some(listed, bad, " (--removed lists them all)")
    if written.incomplete:
        print(f"written without fields that cannot be read: {written.incomplete}")
        print_some(written.listed, written.incomplete, "")
    if written.escaped:
        print(
            f"written with bytes that are not UTF-8 as escapes (\\udc80 to \\udcff) in other fields: {written.escaped}"
        )


def print_some(lines: Sequence[str], count: int, where: str) -> None:
    """The first of what could not be read, and how many more there are."""
    for line in lines[:SHOWN]:
        print(f"  {line}")
    if count > SHOWN:
        print(f"  and {count - SHOWN} more{where}")
