"""Hashes of words and of runs of words, for many documents at once, in C++ (csrc/shingle, csrc/minhash) or in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megalm.corpus.dedup.scripts import ALONE, JOINER, LEADING, LETTER, MARK, SEPARATOR, classify_characters
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.suffix import load_native
from megalm.data.mixing import mix

# Bytes as they count in a word: ASCII letters and digits as small letters, those of characters beyond as they are.
# 0 separates words; characters beyond ASCII have their classes (megalm/corpus/dedup/scripts.py).
_LETTERS = np.zeros(256, np.uint8)
_LETTERS[[*range(48, 58), *range(97, 123), *range(128, 256)]] = [*range(48, 58), *range(97, 123), *range(128, 256)]
_LETTERS[65:91] = range(97, 123)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def hash_words(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each word, in lower case, of each text.

    Shapes: -> uint64 [words of all texts], and where each text's words end int64 [texts]
    """
    parts = [text.lower().encode("utf-8", "replace") for text in texts]
    data = np.frombuffer(b"\n".join([*parts, b""]), np.uint8)
    text_ends = np.cumsum([len(part) + 1 for part in parts])
    inside, begins = _words(data)
    starts = np.flatnonzero(begins)
    if len(starts) == 0:
        return np.empty(0, np.uint64), np.zeros(len(parts), np.int64)
    flat = np.flatnonzero(inside)  # every byte of every word, one after another
    first = np.searchsorted(flat, starts)
    lengths = np.diff(first, append=len(flat))
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _MULTIPLIER))
    offsets = np.arange(len(flat)) - np.repeat(first, lengths)
    sums = np.add.reduceat((data[flat].astype(np.uint64) + np.uint64(1)) * powers[offsets], first)
    return mix(sums), np.searchsorted(starts, text_ends)


def _words(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each byte of UTF-8, whether it is in a word, and whether a word begins with it."""
    heads = np.flatnonzero((data & 0xC0) != 0x80)  # the first byte of each character
    codes = np.frombuffer(data.tobytes().decode("utf-8").encode("utf-32-le"), "<u4")
    kind = classify_characters()[codes]
    before = np.concatenate(([SEPARATOR], kind[:-1]))
    extends = (kind == MARK) | (kind == JOINER)
    # What the word of a character is made of: the last one at or before it that does not extend what is before it.
    place = np.maximum.accumulate(np.where(extends, 0, np.arange(len(kind))))
    base = np.where(extends[place], SEPARATOR, kind[place])
    in_single = np.isin(np.concatenate(([SEPARATOR], base[:-1])), (ALONE, LEADING))
    none = before == SEPARATOR
    begins = (kind == LETTER) & (none | in_single) | extends & none | (kind == LEADING)
    begins |= (kind == ALONE) & (before != LEADING) & (before != JOINER)
    inside, at = np.zeros(len(data), bool), np.zeros(len(data), bool)
    at[heads[begins]] = True
    inside[:] = np.repeat(kind != SEPARATOR, np.diff(heads, append=len(data)))
    return inside, at


def hash_run(words: np.ndarray) -> int:
    """The hash of one run of words, by theirs."""
    total = np.zeros(1, np.uint64)
    for word in words:
        total = total * _MULTIPLIER + word
    return int(mix(total)[0])


def make_shingles(texts: Texts | Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Make the set of runs of `words` words of each text, as sorted hashes; a shorter text is one run.

    Shapes: -> uint64 [all], and the offsets of each text's part int64 [texts + 1]
    """
    library = load_native()
    if library is None:
        return _shingles(list(texts), words)
    texts = texts if isinstance(texts, Texts) else Texts.of(texts)
    data, ends = texts.in_lower_case()
    values, offsets = np.empty(len(data) // 2 + len(texts) + 1, np.uint64), np.zeros(len(texts) + 1, np.int64)
    classes = np.empty(0, np.uint8) if texts.ascii.all() else classify_characters()
    addresses = (array.ctypes.data for array in (values, offsets))
    inputs = (data.ctypes.data, ends.ctypes.data, len(texts), words, _LETTERS.ctypes.data, classes.ctypes.data)
    if not library.word_shingles(*inputs, len(classes), *addresses):
        raise MemoryError("no memory to sort the runs of a text")
    return values[: offsets[-1]].copy(), offsets


def _shingles(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in numpy, for where the extension was not built."""
    hashes, ends = hash_words(texts)
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


def hash_bands(values: np.ndarray, offsets: np.ndarray, factors: np.ndarray, addends: np.ndarray) -> np.ndarray:
    """Hashes of the bands of the sets' MinHash signatures, as csrc/minhash/op.h defines them.

    Shapes: values, offsets as `make_shingles` gives them; uint32 [bands, rows] twice -> uint64 [bands, sets]
    """
    (bands, rows), sets = factors.shape, len(offsets) - 1
    out = np.empty((bands, sets), np.uint64)
    library = load_native()
    if library is None:
        return _band_hashes(values, offsets, factors, addends)
    inputs = [np.ascontiguousarray(array) for array in (values, offsets, factors, addends)]
    addresses = [array.ctypes.data for array in (*inputs, out)]
    if not library.minhash(*addresses[:2], sets, bands, rows, *addresses[2:]):
        raise MemoryError("no memory for the signatures of sets")
    return out


def _band_hashes(values: np.ndarray, offsets: np.ndarray, factors: np.ndarray, addends: np.ndarray) -> np.ndarray:
    """The same in numpy."""
    high = (values >> np.uint64(32)).astype(np.uint32)
    filled = np.flatnonzero(np.diff(offsets))
    hashes = np.zeros((len(factors), len(offsets) - 1), np.uint64)
    for band, (band_factors, band_addends) in enumerate(zip(factors, addends, strict=True)):
        for factor, addend in zip(band_factors, band_addends, strict=True):
            least = np.full(len(offsets) - 1, 2**32 - 1, np.uint64)
            if len(filled):
                least[filled] = np.minimum.reduceat(high * factor + addend, offsets[filled])
            hashes[band] = mix(hashes[band] + least * _MULTIPLIER)
    return hashes


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    if len(a) == 0 or len(b) == 0:
        return 0.0
    if len(a) > len(b):
        a, b = b, a
    found = np.searchsorted(b, a)
    common = int((b[np.minimum(found, len(b) - 1)] == a).sum())
    return common / (len(a) + len(b) - common)
