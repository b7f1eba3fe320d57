"""Documents with nearly the same words; the first of each cluster stays."""

import argparse

from ..corpus_options import add_corpus_arguments, finish, open_corpus

HELP = "documents with nearly the same words (MinHash, verified); the first of each cluster stays"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_corpus_arguments(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="Jaccard similarity from which two are the same (%(default)s)"
    )
    parser.add_argument(
        "--words", type=int, default=5, help="words in a run; the sets that are compared hold runs (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from megalm.corpus.dedup.near import find_near_duplicates

    with open_corpus(args, "near", threshold=args.threshold, words=args.words) as corpus:
        removals, pairs = find_near_duplicates(corpus, args.threshold, args.words)
        return finish(args, corpus, removals, {"verified_pairs": len(pairs)})
