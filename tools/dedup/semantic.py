"""Documents that mean the same, by their embeddings."""

import argparse
import os

from megalm.config.errors import ConfigError

from ..corpus_options import add_corpus_arguments, finish, list_results, open_corpus

HELP = "documents that mean the same, by embeddings (k-means, cosine inside a cluster: SemDeDup)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_corpus_arguments(parser)
    parser.add_argument(
        "--embeddings",
        metavar="FILE.npy",
        help="a row a document, in the order of the input; default: words and pairs of words, weighted by TF-IDF, "
        "projected to 128 numbers",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.95, help="cosine from which two mean the same (%(default)s)"
    )
    parser.add_argument("--clusters", type=int, metavar="N", help="of k-means; default: one for 2,000 documents")
    parser.add_argument(
        "--keep",
        default="first",
        choices=("first", "far", "near"),
        help="who stays: the first in the input, or the one that is far from its cluster's centre, or near (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from megalm.corpus.dedup.semantic import find_semantic_duplicates

    options = {name: getattr(args, name) for name in ("threshold", "clusters", "keep")}
    if args.embeddings:
        try:
            status = os.stat(args.embeddings)
        except OSError as error:
            raise ConfigError(f"--embeddings {args.embeddings}: {error.strerror}. Give a .npy file.") from error
        list_results(args).refuse_inputs([args.embeddings])
        options["embeddings"] = [os.path.abspath(args.embeddings), status.st_size, status.st_mtime_ns]
    with open_corpus(args, "semantic", **options) as corpus:
        removals = find_semantic_duplicates(corpus, args.embeddings, args.threshold, args.clusters, args.keep)
        return finish(args, corpus, removals)
