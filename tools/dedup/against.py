"""Training documents that hold text of an evaluation."""

import argparse
import os

from ..corpus_options import add_corpus_arguments, corpus_of, finish, memory_of, results_of

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


def run(args: argparse.Namespace) -> int:
    from megalm.corpus.dedup.contamination import find_contaminated
    from megalm.corpus.dedup.corpus import Corpus
    from megalm.corpus.documents import find_files
    from megalm.corpus.fields import from_command_line
    from megalm.corpus.shards import stamp_files

    field = from_command_line(args.evaluation_field or args.field)
    evaluation_files = results_of(args).input_files(find_files(args.evaluation))
    options = {"words": args.words, "evaluation": [field, *stamp_files(evaluation_files)]}
    with (
        corpus_of(args, "against", **options) as corpus,
        Corpus(
            args.evaluation,
            field,
            args.skip_bad,
            corpus.stages.engine,
            os.path.join(corpus.folder, "evaluation"),
            ("evaluation", options),
            memory=memory_of(args),
            results=results_of(args),
        ) as evaluation,
    ):
        removals, short = find_contaminated(corpus, evaluation, args.words)
        status = finish(args, corpus, removals, {"evaluation_documents_too_short": short})
        corpus.results.mark(evaluation.files)
        return status
