"""Options and the last step that the ways of removing documents share."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import Any

from megalm.config.errors import ConfigError
from megalm.data.dedup.corpus import Corpus
from megalm.data.dedup.removal import Removals, write_lists
from megalm.data.engine import make_engine
from tools.engine_options import add_worker_arguments


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, globs or URLs, as tools/tokenize takes them"
    )
    parser.add_argument("--output", metavar="FILE", help="write the documents that stay here, as JSON lines")
    parser.add_argument("--removed", metavar="FILE", help="write what was removed and why here, as JSON lines")
    parser.add_argument("--field", default="text", help="key or column of the text (%(default)s)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out documents that cannot be read, instead of stopping"
    )
    add_worker_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


@contextlib.contextmanager
def corpus_of(args: argparse.Namespace) -> Iterator[Corpus]:
    """The input, and what runs the stages over it; their files lie beside the result until the end."""
    for name in (args.output, args.removed):
        if name and name in args.inputs:
            raise ConfigError(f"{name} is an input: write the result to another file.")
    target = args.output or args.removed
    with (
        make_engine(args.engine, args.workers, args.engine_address) as engine,
        Corpus(args.inputs, args.field, args.skip_bad, engine, f"{target}.parts" if target else None) as corpus,
    ):
        yield corpus


def finish(args: argparse.Namespace, corpus: Corpus, removals: Removals, more: dict[str, Any] | None = None) -> int:
    counts = write_lists(corpus, removals, args.output, args.removed)
    result = {"documents": counts.documents, "removed": counts.removed, "bad": counts.bad, **(more or {})}
    if args.json:
        print(json.dumps(result))
        return 0
    share = counts.removed / max(counts.documents, 1)
    print(f"{counts.documents} documents, {counts.removed} to remove ({share:.1%})")
    for name, value in {"bad": counts.bad, **(more or {})}.items():
        if value:
            print(f"{name.replace('_', ' ')}: {value}")
    return 0
