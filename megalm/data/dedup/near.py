"""Nearly equal documents: MinHash signatures, banded buckets, verified Jaccard similarity, clusters of which the first stays.

Signatures are rensa's R-MinHash over hashes of runs of words that numpy makes; sets and signatures wait on disk, and each band is
sorted alone, so that memory holds 16 bytes a document and the candidate pairs.
Source: Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.dedup.removal import Corpus, Removal
from megalm.data.dedup.shingles import jaccard, shingles
from megalm.data.order import mix

# 21 bands of 6: a pair of similarity 0.8 shares a bucket with probability 0.998, one of 0.7 with 0.92, one of 0.4 with 0.08
BANDS, ROWS = 21, 6
ALL_PAIRS = 32  # in a larger bucket each document is compared with the first and with its neighbour only
SEED = 1


@dataclass(frozen=True)
class NearDuplicate:
    """A verified pair."""

    first: int
    second: int
    similarity: float


class _Clusters:
    """Union-find; the root of a cluster is its smallest number."""

    def __init__(self, size: int):
        self.parent = np.arange(size)

    def find(self, item: int) -> int:
        root = item
        while self.parent[root] != root:
            root = int(self.parent[root])
        while self.parent[item] != root:
            self.parent[item], item = root, int(self.parent[item])
        return root

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


def near_duplicates(
    corpus: Corpus, threshold: float = 0.8, words: int = 5
) -> tuple[dict[int, Removal], list[NearDuplicate]]:
    """Documents to remove, and the pairs that decided it.

    Errors: ConfigError without rensa, or if a number does not fit.
    """
    if not 0.0 < threshold <= 1.0 or words < 1:
        raise ConfigError(
            f"--threshold is {threshold} and --words {words}: the one lies above 0 and up to 1, the other is at least 1."
        )
    rensa = _rensa()
    with tempfile.TemporaryDirectory(prefix="dedup-") as folder:
        sets_path, bands_path = os.path.join(folder, "sets"), os.path.join(folder, "bands")
        ends: list[np.ndarray] = [np.zeros(1, np.int64)]
        with open(sets_path, "wb") as sets_file, open(bands_path, "wb") as bands_file:
            for texts in corpus.batches():
                values, offsets = shingles(texts, words)
                sets_file.write(values.data)
                bands_file.write(_band_hashes(rensa, values, offsets).data)
                ends.append(offsets[1:] + ends[-1][-1])
        bounds = np.concatenate(ends)
        size = len(bounds) - 1
        if size == 0 or bounds[-1] == 0:
            return {}, []
        sets = np.memmap(sets_path, np.uint64, "r")
        bands = np.memmap(bands_path, np.uint64, "r", shape=(size, BANDS))
        clusters, pairs = _Clusters(size), []
        nonempty = np.diff(bounds) > 0
        for first, second in _candidates(bands, nonempty):
            if clusters.find(first) == clusters.find(second):
                continue
            similarity = jaccard(sets[bounds[first] : bounds[first + 1]], sets[bounds[second] : bounds[second + 1]])
            if similarity >= threshold:
                clusters.join(first, second)
                pairs.append(NearDuplicate(first, second, similarity))
        del sets, bands
    return _removals(clusters, pairs), pairs


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError("finding near-duplicates needs rensa: `pip install --no-deps rensa`.") from error
    return rensa


def _band_hashes(rensa: Any, values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Shapes: -> uint64 [documents, BANDS]"""
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(values, offsets.astype(np.uint64), BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, ROWS)
    hashes = np.zeros(rows.shape[:2], np.uint64)
    for row in range(ROWS):
        hashes = mix(hashes + rows[:, :, row] * np.uint64(0x9E3779B97F4A7C15))
    return np.ascontiguousarray(hashes)


def _candidates(bands: np.ndarray, nonempty: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs that share a bucket in some band, the smaller number first; a pair may come once for each band."""
    for band in range(BANDS):
        column = np.asarray(bands[:, band])
        order = np.argsort(column, kind="stable")
        order = order[nonempty[order]]
        values = column[order]
        starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
        stops = np.append(starts[1:], len(values))
        for start, stop in zip(starts[stops - starts > 1], stops[stops - starts > 1], strict=True):
            bucket = order[start:stop].tolist()
            if len(bucket) <= ALL_PAIRS:
                yield from ((a, b) for i, a in enumerate(bucket) for b in bucket[i + 1 :])
            else:
                yield from ((bucket[0], b) for b in bucket[1:])
                yield from zip(bucket, bucket[1:], strict=False)


def _removals(clusters: _Clusters, pairs: list[NearDuplicate]) -> dict[int, Removal]:
    best: dict[int, NearDuplicate] = {}
    for pair in pairs:
        for number in (pair.first, pair.second):
            if number not in best or pair.similarity > best[number].similarity:
                best[number] = pair
    removals = {}
    for number, pair in best.items():
        root = clusters.find(number)
        if root != number:
            other = pair.first if pair.second == number else pair.second
            removals[number] = Removal(
                root, f"Jaccard similarity {pair.similarity:.3f} to document {other} of the same cluster"
            )
    return removals
