"""Joining the tokens of all shards, in their order, into one token file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megalm.corpus.tokenize_corpus import ShardResult
from megalm.data.tokens import TokenWriter, choose_token_dtype

MERGED_DOCUMENTS = 1 << 16  # lengths read at a time
MERGED_TOKENS = 1 << 22  # tokens copied at a time


def merge(
    folder: str,
    results: Iterable[ShardResult],
    prefix: str,
    vocab_size: int,
    check: Callable[[], None] = lambda: None,
) -> list[ShardResult]:
    """Joins the shards' files into PREFIX.bin and PREFIX.idx as they come; memory does not grow with their size. `check`
    may refuse them at the end.

    Returns the results, if there was any document; else nothing is written.
    """
    dtype = choose_token_dtype(vocab_size)
    seen: list[ShardResult] = []
    writer = TokenWriter(prefix, dtype)
    try:
        for result in results:
            seen.append(result)
            stem = os.path.join(folder, f"{result.shard:06d}")
            with open(stem + ".tokens", "rb") as tokens, open(stem + ".lengths", "rb") as lengths:
                while len(chunk := np.fromfile(lengths, "<i8", MERGED_DOCUMENTS)):
                    for start, stop in cut_into_parts(chunk):
                        part = chunk[start:stop]
                        writer.add_documents(np.fromfile(tokens, dtype, int(part.sum())), part)
        check()
    except BaseException:
        writer.abort()
        raise
    if writer.num_documents:
        writer.finish()
    else:
        writer.abort()
    return seen


def cut_into_parts(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents of MERGED_TOKENS or fewer, a longer document alone."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + MERGED_TOKENS, side="right")))
        yield start, stop
        start = stop
