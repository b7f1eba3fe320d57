"""Documents in groups that are named by their words: k-means over hashed words, nothing to be downloaded.

A text is a vector of DIMS numbers: each of its different words adds its rarity to one of them, with a sign, both by the word's
hash (Weinberger et al. 2009, arXiv:0902.2206). Vectors have length 1; the centre of a group is the mean of its vectors, also of
length 1 (spherical k-means, Dhillon and Modha 2001), begun from texts that lie far apart (k-means++).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.corpus.dedup.shingles import make_shingles
from megalm.corpus.dedup.texts import Texts

DIMS = 512
ROUNDS = 30
NAMED_BY = 4  # words


@dataclass(frozen=True)
class Clusters:
    """Shapes: of int64 [texts], the group of each; names: one for each group, the largest first"""

    of: np.ndarray
    names: list[str]


def embed_texts(texts: Texts) -> np.ndarray:
    """The vectors. Shapes: -> float32 [texts, DIMS]"""
    values, offsets = make_shingles(texts, 1)
    owner = np.repeat(np.arange(len(texts)), np.diff(offsets))
    words, inverse, times = np.unique(values, return_inverse=True, return_counts=True)
    rarity = np.log((1 + len(texts)) / (1 + times))
    sign = np.where(words & np.uint64(1), 1.0, -1.0)
    dim = (words >> np.uint64(64 - DIMS.bit_length() + 1)).astype(np.int64)
    flat = np.bincount(owner * DIMS + dim[inverse], (rarity * sign)[inverse], len(texts) * DIMS)
    vectors = flat.reshape(len(texts), DIMS).astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cluster_texts(texts: Texts, words: Sequence[list[str]], count: int, seed: int = 0) -> Clusters:
    """Groups of texts that share words; fewer than `count` where some would be empty.

    words: those of each text, in small letters, by which groups are named.
    """
    vectors = embed_texts(texts)
    of = _group(vectors, min(count, len(texts)), np.random.default_rng(seed))
    sizes = np.bincount(of)
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    new = np.empty(len(sizes), np.int64)
    new[order] = np.arange(len(order))
    of = new[of]
    return Clusters(of, _name(of, words, len(order)))


def _group(vectors: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    centres = vectors[[int(random.integers(len(vectors)))]]
    nearest = vectors @ centres[0]
    while len(centres) < count:
        far = np.maximum(1 - nearest, 0) ** 2
        if far.sum() < 1e-9:
            break
        chosen = vectors[int(random.choice(len(vectors), p=far / far.sum()))]
        centres = np.concatenate((centres, chosen[None]))
        nearest = np.maximum(nearest, vectors @ chosen)
    of = np.full(len(vectors), -1)
    for _ in range(ROUNDS):
        before, of = of, (vectors @ centres.T).argmax(1)
        if (before == of).all():
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, of, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
    return of


def _name(of: np.ndarray, words: Sequence[list[str]], count: int) -> list[str]:
    """Name words that many texts of a group have, and few others."""
    everywhere: Counter[str] = Counter()
    inside: list[Counter[str]] = [Counter() for _ in range(count)]
    for group, listed in zip(of.tolist(), words, strict=True):
        different = {word for word in listed if not word.isdigit()}
        inside[group].update(different)
        everywhere.update(different)
    names: list[str] = []
    for counts in inside:
        size = max(int((of == len(names)).sum()), 1)

        def worth(item: tuple[str, int], size: int = size) -> float:
            share, outside = item[1] / size, everywhere[item[0]] / len(of)
            return share * float(np.log(share / outside)) if share > outside else share * 1e-6

        best = sorted(counts.items(), key=lambda item: (-worth(item), item[0]))[:NAMED_BY]
        names.append(" ".join(word for word, _ in best) or "(no words)")
    return names
