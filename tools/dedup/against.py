"""Training documents that hold text of an evaluation."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..corpus_options import add_corpus_arguments, finish, list_results, open_corpus, parse_memory

if TYPE_CHECKING:
    from megalm.corpus.dedup.contamination import Benchmark

HELP = "training documents that share a run of words with evaluation text; also as --against EVAL, without a command"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_corpus_arguments(parser)
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="FILE", help="the evaluation's text")
    parser.add_argument(
        "--evaluation-field", metavar="KEY", help="its key, column or template; default: that of --field"
    )
    parser.add_argument(
        "--words", type=int, default=13, help="words in a run; one run in common is enough (%(default)s)"
    )
    parser.add_argument(
        "--characters",
        type=int,
        default=20,
        metavar="N",
        help="an item of fewer words counts where it stands whole, if it has as many characters (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from megalm.corpus.dedup.contamination import find_contaminated
    from megalm.corpus.dedup.corpus import Corpus
    from megalm.corpus.documents import find_files
    from megalm.corpus.fields import unescape_template
    from megalm.corpus.shards import stamp_files

    field = unescape_template(args.evaluation_field or args.field)
    evaluation_files = list_results(args).input_files(find_files(args.evaluation))
    options = {
        "words": args.words,
        "characters": args.characters,
        "evaluation": [field, *stamp_files(evaluation_files)],
    }
    with (
        open_corpus(args, "against", **options) as corpus,
        Corpus(
            args.evaluation,
            field,
            args.skip_bad,
            corpus.stages.engine,
            os.path.join(corpus.folder, "evaluation"),
            ("evaluation", options),
            memory=parse_memory(args),
            results=list_results(args),
        ) as evaluation,
    ):
        found = find_contaminated(corpus, evaluation, args.words, args.characters)
        more: dict[str, Any] = {"evaluation_documents_too_short": found.too_short}
        if args.json:
            more["benchmarks"] = [dataclasses.asdict(benchmark) for benchmark in found.benchmarks]
        status = finish(args, corpus, found.removals, more)
        if not args.json:
            print_benchmarks(found.benchmarks)
        corpus.results.mark(evaluation.files)
        return status


def print_benchmarks(benchmarks: "Sequence[Benchmark]") -> None:
    """Of each file of the evaluation, how much of it was found, and in how many documents."""
    for one in benchmarks:
        share = one.found / max(one.items, 1)
        print(
            f"{one.name}: {one.found} of {one.items} documents found ({share:.1%}), in {one.training_documents} of the "
            "training documents"
        )
