"""What documents of a sample share: whole texts, nearly whole ones, and spans of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.corpus.dedup.shingles import hash_bands, jaccard, make_shingles
from megalm.corpus.dedup.texts import Texts
from megalm.data.look import find_repeats

NEAR = 0.8  # similarity from which texts are near duplicates, as megalm dedup near has it
BANDS, ROWS = 16, 8
SPAN = 10  # words of the shortest span that is shown
SPANS = 30


@dataclass(frozen=True)
class Duplicates:
    """Shapes: group int64 [texts], the same for texts that are alike, -1 for one that is alone"""

    group: np.ndarray
    exact: int
    """Texts that were there before, letter by letter."""
    near: int
    """Texts that are in a group with one before them."""


@dataclass(frozen=True)
class Span:
    """Words that stand in several places of the sample."""

    text: str
    times: int
    documents: list[int]
    """The first of those that have it."""


def find_duplicates(texts: Texts, keys: Sequence[str]) -> Duplicates:
    """Find groups of texts that share most of their runs of five words."""
    values, offsets = make_shingles(texts, 5)
    random = np.random.default_rng(7)
    factors, addends = (random.integers(1, 2**31, (BANDS, ROWS)).astype(np.uint32) | np.uint32(1) for _ in range(2))
    bands = hash_bands(values, offsets, factors, addends)
    parent = np.arange(len(texts))

    def root(text: int) -> int:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = int(parent[text])
        return text

    first: dict[tuple[int, int | str], int] = {}
    exact = 0
    for number, key in enumerate(keys):
        other = first.setdefault((-1, key), number)
        exact += other != number
        parent[root(number)] = root(other)
    for band in range(BANDS):
        for number, mark in enumerate(bands[band].tolist()):
            if offsets[number + 1] == offsets[number]:
                continue
            other = first.setdefault((band, mark), number)
            if root(other) == root(number):
                continue
            pair = [values[offsets[one] : offsets[one + 1]] for one in (other, number)]
            if jaccard(*pair) >= NEAR:
                low, high = sorted((root(other), root(number)))
                parent[high] = low
    roots = np.array([root(number) for number in range(len(texts))])
    sizes = np.bincount(roots, minlength=len(texts))
    near = int((sizes[sizes > 1] - 1).sum())
    return Duplicates(np.where(sizes[roots] > 1, roots, -1), exact, near)


def find_spans(words: Sequence[list[str]]) -> list[Span]:
    """Find the spans that occur most often, each as long as all that follows repeats as often."""
    numbers: dict[str, int] = {}
    stream: list[int] = []
    owner: list[int] = []
    for document, listed in enumerate(words):
        stream += [numbers.setdefault(word, len(numbers)) for word in listed]
        stream.append((1 << 40) + document)  # no span goes from one document into the next
        owner += [document] * (len(listed) + 1)
    if len(stream) < SPAN:
        return []
    ids, named = np.array(stream), list(numbers)
    found = find_repeats([(0, ids)], SPAN, SPANS)
    spans = []
    for row in found:
        span = ids[row["token"] : row["token"] + row["tokens"]].tolist()
        text = " ".join(named[number] for number in span if number < 1 << 40)
        places = [int(place) for place in row["places"]]
        spans.append(Span(text, row["times"], list(dict.fromkeys(owner[place] for place in places))))
    return spans
