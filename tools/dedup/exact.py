"""Documents with the same text; the first one stays."""

import argparse

from ..corpus_options import add_corpus_arguments, finish, open_corpus

HELP = "documents with the same text; the first one stays"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_corpus_arguments(parser)
    parser.add_argument("--normalize", action="store_true", help="case and white space make no difference")


def run(args: argparse.Namespace) -> int:
    from megalm.corpus.dedup.exact import find_exact_duplicates

    with open_corpus(args, "exact", normalize=args.normalize) as corpus:
        return finish(args, corpus, find_exact_duplicates(corpus, args.normalize))
