"""Hashes of words and of runs of words, for many documents at once, in C++ (csrc/shingle) or in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalm.data.order import mix
from megalm.data.suffix import native

# Which bytes belong to words: ASCII letters and digits, and everything beyond ASCII. The rest separates words.
_WORD = np.zeros(256, bool)
_WORD[[*range(48, 58), *range(65, 91), *range(97, 123), *range(128, 256)]] = True
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each word, in lower case, of each text.

    Shapes: -> uint64 [words of all texts], and where each text's words end int64 [texts]
    """
    parts = [_bytes(text) for text in texts]
    data = np.frombuffer(b"\n".join([*parts, b""]), np.uint8)
    text_ends = np.cumsum([len(part) + 1 for part in parts])
    inside = np.concatenate(([False], _WORD[data], [False]))
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[0::2], edges[1::2]
    if len(starts) == 0:
        return np.empty(0, np.uint64), np.zeros(len(texts), np.int64)
    lengths = ends - starts
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _MULTIPLIER))
    flat = np.flatnonzero(inside[1:-1])  # every byte of every word, one after another
    first = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    offsets = np.arange(len(flat)) - np.repeat(first, lengths)
    sums = np.add.reduceat((data[flat].astype(np.uint64) + np.uint64(1)) * powers[offsets], first)
    return mix(sums), np.searchsorted(starts, text_ends)


def shingles(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """The set of runs of `words` words of each text, as sorted hashes; a shorter text is one run.

    Shapes: -> uint64 [all], and the offsets of each text's part int64 [texts + 1]
    """
    library = native()
    if library is None:
        return _shingles(texts, words)
    parts = [_bytes(text) for text in texts]
    data = np.frombuffer(b"".join(parts), np.uint8)
    text_ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    values, offsets = np.empty(len(data) // 2 + len(texts) + 1, np.uint64), np.zeros(len(texts) + 1, np.int64)
    addresses = (array.ctypes.data for array in (_WORD, values, offsets))
    if not library.shingles(data.ctypes.data, text_ends.ctypes.data, len(texts), words, *addresses):
        raise MemoryError("no memory to sort the runs of a text")
    return values[: offsets[-1]].copy(), offsets


def _bytes(text: str) -> bytes:
    return text.lower().encode("utf-8", "replace")


def _shingles(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in numpy, for where the extension was not built."""
    hashes, ends = word_hashes(texts)
    counts = np.diff(ends, prepend=0)
    gap = words - 1  # zeros after each text, so that no run crosses into the next one
    padded = np.zeros(len(hashes) + gap * len(texts), np.uint64)
    text = np.repeat(np.arange(len(texts)), counts)
    padded[np.arange(len(hashes)) + gap * text] = hashes
    runs = np.zeros(len(padded) - gap if len(padded) else 0, np.uint64)
    for place in range(words):
        runs = runs * _MULTIPLIER + padded[place : place + len(runs)]
    begins = (ends - counts) + gap * np.arange(len(texts))
    number = np.where(counts >= words, counts - words + 1, np.minimum(counts, 1))
    owner = np.repeat(np.arange(len(texts)), number)
    first = np.concatenate(([0], np.cumsum(number)[:-1]))
    where = np.arange(int(number.sum())) - np.repeat(first, number) + np.repeat(begins, number)
    values = mix(runs[where])
    order = np.lexsort((values, owner))
    values, owner = values[order], owner[order]
    keep = np.ones(len(values), bool)
    keep[1:] = (values[1:] != values[:-1]) | (owner[1:] != owner[:-1])
    return values[keep], np.concatenate(([0], np.cumsum(np.bincount(owner[keep], minlength=len(texts)))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    if len(a) == 0 or len(b) == 0:
        return 0.0
    if len(a) > len(b):
        a, b = b, a
    found = np.searchsorted(b, a)
    common = int((b[np.minimum(found, len(b) - 1)] == a).sum())
    return common / (len(a) + len(b) - common)
