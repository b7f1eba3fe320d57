"""Shows prepared records as the model will see them."""

import argparse
import sys

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.tokens import TokenFile
from megalm.tokenizer.tokenizer import load_tokenizer

HELP = "prepared records as the model sees them, with what is learned marked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="PREFIX of `megalm posttrain prepare`")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer that made it")
    parser.add_argument("--sample", type=int, default=3, metavar="N", help="records to show (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")


def run(args: argparse.Namespace) -> int:
    """Print a sample of records; what is learned is green on a terminal, and between brackets elsewhere."""
    tokens, tokenizer = TokenFile(args.prefix), load_tokenizer(args.tokenizer)
    if tokens.targets is None:
        raise ConfigError(f"{args.prefix} has no {args.prefix}.targets: it is text, of which every token is learned.")
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    count = min(args.sample, tokens.num_documents)
    chosen = np.sort(np.random.default_rng(args.seed).permutation(tokens.num_documents)[:count])
    for document in chosen.tolist():
        start, stop = tokens.document_start(document), tokens.document_start(document + 1)
        weights = np.asarray(tokens.targets[start:stop], np.float32)
        ids = tokens.read(start, stop)
        edges = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), stop - start]
        print(f"record {document + 1}: {stop - start} tokens, {int(np.count_nonzero(weights))} learned")
        for first, last in zip(edges, edges[1:], strict=False):
            text = tokenizer.decode(ids[first:last].tolist())
            print(f"{begin}{text}{end}" if weights[first] else text, end="")
        print("\n")
    return 0
