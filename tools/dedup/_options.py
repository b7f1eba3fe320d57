"""Options and the last step that the ways of removing documents share."""

import argparse
import json
from typing import Any

from megalm.config.errors import ConfigError
from megalm.data.dedup.removal import Corpus, Removal, write_lists


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
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def corpus_of(args: argparse.Namespace) -> Corpus:
    for name in (args.output, args.removed):
        if name and name in args.inputs:
            raise ConfigError(f"{name} is an input: write the result to another file.")
    return Corpus(args.inputs, args.field, args.skip_bad)


def finish(
    args: argparse.Namespace, corpus: Corpus, removals: dict[int, Removal], more: dict[str, Any] | None = None
) -> int:
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
