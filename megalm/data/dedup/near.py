"""Nearly equal documents: MinHash signatures, banded buckets, verified Jaccard similarity, clusters of which the first stays.

Sets of runs of words and the hashes of their signatures' bands are made in C++ (csrc/shingle, csrc/minhash). Each shard
leaves its sets and its band hashes on disk; the hashes are compared by bands, in parts by their value where there are
many; candidate pairs are dealt out by their first document, so that each is verified once. Memory: 40 bytes for each of
PART_HASHES hashes in a stage and 16 for each candidate pair among them; where the clusters are joined, 100 bytes for each
pair of near-duplicates.
Source: Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.dedup.corpus import Corpus, PartStage, ShardStage
from megalm.data.dedup.files import deal, dealt_to, load, save, shard_path
from megalm.data.dedup.removal import RECORD, Removals, save_records, table
from megalm.data.dedup.shingles import band_hashes, jaccard, shingles
from megalm.data.mixing import mix
from megalm.data.suffix import native

# 21 bands of 6: a pair of similarity 0.8 shares a bucket with probability 0.998, one of 0.7 with 0.92, one of 0.4 with 0.08
BANDS, ROWS = 21, 6
ALL_PAIRS = 32  # in a larger bucket each document is compared with the first and with its neighbour only
PART_HASHES = 1 << 22  # compared at a time
CHUNK = 1 << 20  # pairs verified at a time
EDGE = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f8")])
WHY = "Jaccard similarity {value:.3f} to document {other} of the same cluster"
# The hash functions of the signatures: multiply and add modulo 2^32, by odd multipliers.
_DRAWN = mix(np.arange(1, 2 * BANDS * ROWS + 1, dtype=np.uint64)).astype(np.uint32).reshape(2, BANDS, ROWS)
_FACTORS, _ADDENDS = _DRAWN[0] | np.uint32(1), _DRAWN[1]


@dataclass(frozen=True)
class _Near:
    threshold: float
    words: int


def near_duplicates(corpus: Corpus, threshold: float = 0.8, words: int = 5) -> tuple[Removals, np.ndarray]:
    """Documents to remove, and the verified pairs that decided it.

    Shapes: -> EDGE [pairs], sorted
    Errors: ConfigError if a number does not fit.
    """
    if not 0.0 < threshold <= 1.0 or words < 1:
        raise ConfigError(
            f"--threshold is {threshold} and --words {words}: the one lies above 0 and up to 1, the other is at least 1."
        )
    wanted = _Near(threshold, words)
    corpus.each_shard(_sign_shard, wanted, "signatures")
    together = min(max(PART_HASHES // max(corpus.documents, 1), 1), BANDS)  # bands in a task
    splits = max(1, -(-corpus.documents // PART_HASHES))
    dealers = -(-BANDS // together) * splits
    parts = max(min(4, len(corpus.shards)), len(corpus.shards) // 4)  # that candidate pairs are dealt to
    corpus.each_part(_pair_part, dealers, (together, splits, parts), "candidates")
    corpus.each_part(_verify_part, parts, (wanted, dealers), "verifying")
    edges = np.concatenate([load(os.path.join(corpus.folder, f"edges.{part:06d}"), EDGE) for part in range(parts)])
    edges = edges[np.lexsort((edges["second"], edges["first"]))]
    save_records(os.path.join(corpus.folder, "near.removals"), cluster(edges))
    return table(corpus, ["near.removals"], WHY), edges


def _sign_shard(stage: ShardStage) -> int:
    """Leaves the shard's sets, where each document's set ends, and its band hashes [BANDS, documents]."""
    ends: list[np.ndarray] = [np.zeros(1, np.int64)]
    hashes: list[np.ndarray] = [np.empty((BANDS, 0), np.uint64)]
    partial = stage.path(f"sets.{os.getpid()}.partial")
    with open(partial, "wb") as sets:
        for texts in stage.batches():
            values, offsets = shingles(texts, stage.argument.words)
            sets.write(values.data)
            hashes.append(band_hashes(values, offsets, _FACTORS, _ADDENDS))
            ends.append(offsets[1:] + ends[-1][-1])
    os.replace(partial, stage.path("sets"))
    bounds = np.concatenate(ends)
    save(stage.path("ends"), bounds.astype("<i8"))
    save(stage.path("bands"), np.concatenate(hashes, axis=1))
    return len(bounds) - 1


def _pair_part(task: PartStage) -> int:
    """Candidate pairs of some bands among the hashes of one split, dealt to the parts that verify them."""
    together, splits, parts = task.argument
    group, split = divmod(task.part, splits)
    bands = range(group * together, min((group + 1) * together, BANDS))
    none = band_hashes(np.empty(0, np.uint64), np.zeros(2, np.int64), _FACTORS, _ADDENDS)[bands[0], 0]
    numbers, hashes = [np.empty(0, np.int64)], [np.empty((len(bands), 0), np.uint64)]
    for shard, first in enumerate(task.starts[:-1]):
        count = task.starts[shard + 1] - first
        rows = load(shard_path(task.folder, shard, "bands"), "<u8", bands.start * count, bands.stop * count)
        rows = rows.reshape(len(bands), count)
        mine = rows[0] != none  # a document without words is like no other
        if splits > 1:  # and then one band
            mine &= mix(rows[0]) % np.uint64(splits) == np.uint64(split)
        numbers.append(np.flatnonzero(mine) + first)
        hashes.append(rows[:, mine])
    pairs = _candidates(np.concatenate(hashes, axis=1), np.concatenate(numbers))
    deal(pairs[:, 0] % parts, parts, pairs, os.path.join(task.folder, f"pairs.{task.part:06d}"))
    return len(pairs)


def _candidates(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Pairs that share a bucket of any band, the smaller number first, each once. Documents are known by the first bits
    of their hashes, so that a few pairs more than need be may be among them.

    Shapes: uint64 [bands, documents], int64 [documents] ascending -> int64 [pairs, 2]
    """
    count = len(numbers)
    bits = np.uint64(max(count.bit_length(), 1))
    keys = (hashes >> bits << bits) | np.arange(count, dtype=np.uint64)  # sorted, a bucket's documents are in order
    keys.sort(axis=1)
    new = np.ones(keys.shape, bool)
    new[:, 1:] = keys[:, 1:] >> bits != keys[:, :-1] >> bits
    starts = np.flatnonzero(new)
    sizes = np.diff(starts, append=keys.size)
    documents = (keys & ((np.uint64(1) << bits) - np.uint64(1))).ravel()
    found = [np.empty(0, np.uint64)]
    for a, b in _places_of_pairs(starts[sizes > 1], sizes[sizes > 1]):
        found.append(documents[a] << bits | documents[b])
    pairs = np.sort(np.concatenate(found))
    pairs = pairs[np.append(pairs[1:] != pairs[:-1], True)[: len(pairs)]]
    return np.stack((numbers[pairs >> bits], numbers[pairs & ((np.uint64(1) << bits) - np.uint64(1))]), axis=1)


def _places_of_pairs(starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of the two of each pair, in buckets that begin and are as large as this."""
    large = sizes > ALL_PAIRS
    if large.any():
        places, first = _ranges(starts[large] + 1, sizes[large] - 1)
        yield first - 1, places
    for distance in range(1, ALL_PAIRS):
        if distance > 1:
            keep = (sizes > distance) & (sizes <= ALL_PAIRS)
            starts, sizes = starts[keep], sizes[keep]
        if len(starts) == 0:
            return
        places, _ = _ranges(starts, sizes - distance)
        yield places, places + distance


def _ranges(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of ranges one after another, and for each where its range starts."""
    firsts = np.repeat(starts, counts)
    return firsts + np.arange(len(firsts)) - np.repeat(np.cumsum(counts) - counts, counts), firsts


class _Sets:
    """The sets of all shards, mapped into memory."""

    def __init__(self, folder: str, starts: tuple[int, ...]):
        self._folder, self._starts = folder, np.array(starts)
        self._values: dict[int, np.ndarray] = {}

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each document the shard, and where in its sets its own begins and ends."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        begins, ends = np.empty_like(numbers), np.empty_like(numbers)
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(part) == 0:
                continue
            shard = int(shards[part[0]])
            bounds = np.memmap(shard_path(self._folder, shard, "ends"), "<i8", "r")
            local = numbers[part] - self._starts[shard]
            begins[part], ends[part] = bounds[local], bounds[local + 1]
            if shard not in self._values:
                self._values[shard] = np.memmap(shard_path(self._folder, shard, "sets"), "<u8", "r")
        return shards, begins, ends

    def similarities(self, pairs: np.ndarray) -> np.ndarray:
        """Shapes: int64 [pairs, 2] of documents with words -> float64 [pairs]"""
        located = [self._locate(numbers) for numbers in pairs.T]
        library = native()
        if library is None:
            sides = [
                [
                    self._values[shard][begin:end]
                    for shard, begin, end in zip(*map(np.ndarray.tolist, side), strict=True)
                ]
                for side in located
            ]
            return np.array([jaccard(a, b) for a, b in zip(*sides, strict=True)], np.float64)
        bases = np.zeros(len(self._starts), np.uint64)
        for shard, values in self._values.items():
            bases[shard] = values.ctypes.data
        addresses = [bases[shards] + begins.astype(np.uint64) * np.uint64(8) for shards, begins, _ in located]
        sizes = [ends - begins for _, begins, ends in located]
        common = np.empty(len(pairs), np.int64)
        library.intersections(len(pairs), *(array.ctypes.data for array in (*addresses, *sizes, common)))
        return common / (sizes[0] + sizes[1] - common)


def _verify_part(task: PartStage) -> int:
    """The candidate pairs of this part that are similar enough, each once."""
    wanted, dealers = task.argument
    pair = np.dtype(("<i8", 2))
    found = [dealt_to(os.path.join(task.folder, f"pairs.{dealer:06d}"), task.part, pair) for dealer in range(dealers)]
    pairs = np.concatenate([part.reshape(-1, 2) for part in found])
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    if len(found) > 1:
        pairs = pairs[np.append(True, (np.diff(pairs, axis=0) != 0).any(axis=1))[: len(pairs)]]
    edges = [np.empty(0, EDGE)]
    for start in range(0, len(pairs), CHUNK):
        part = pairs[start : start + CHUNK]
        similarity = _Sets(task.folder, task.starts).similarities(part)
        near = similarity >= wanted.threshold
        rows = np.empty(int(near.sum()), EDGE)
        rows["first"], rows["second"], rows["similarity"] = part[near, 0], part[near, 1], similarity[near]
        edges.append(rows)
    whole = np.concatenate(edges)
    save(os.path.join(task.folder, f"edges.{task.part:06d}"), whole)
    return len(whole)


def cluster(edges: np.ndarray) -> np.ndarray:
    """Connected documents are a cluster, of which the smallest number stays.

    The reason of each other one is its most similar pair (the first of equal ones). Shapes: EDGE [N] -> RECORD [removed]
    """
    nodes, ends = np.unique(np.concatenate((edges["first"], edges["second"])), return_inverse=True)
    ends = ends.reshape(2, -1)
    roots = _smallest_connected(len(nodes), *ends)
    both = np.concatenate((ends[0], ends[1]))
    similarity = np.concatenate((edges["similarity"], edges["similarity"]))
    other = np.concatenate((edges["second"], edges["first"]))
    order = np.lexsort((other, -similarity, both))
    best = order[np.flatnonzero(np.diff(both[order], prepend=-1))]  # one for each node, in its order
    gone = roots != np.arange(len(nodes))
    rows = np.zeros(int(gone.sum()), RECORD)
    rows["number"], rows["of"] = nodes[gone], nodes[roots[gone]]
    rows["other"], rows["value"] = other[best][gone], similarity[best][gone]
    return rows


def _smallest_connected(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The smallest node that each is connected to: every round ties the root of each edge's one end below that of the
    other, and flattens the trees. Shapes: int64 [edges] twice -> int64 [count]"""
    root = np.arange(count)
    while True:
        a, b = root[first], root[second]
        open_ = a != b
        if not open_.any():
            return root
        first, second = first[open_], second[open_]
        low, high = np.minimum(a[open_], b[open_]), np.maximum(a[open_], b[open_])
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]
