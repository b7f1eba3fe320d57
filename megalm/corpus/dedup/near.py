"""Nearly equal documents: MinHash signatures, banded buckets, verified Jaccard similarity, clusters of which the first stays.

Sets of runs of words and the hashes of their signatures' bands are made in C++ (csrc/shingle, csrc/minhash). Each shard
leaves its sets and its band hashes on disk; the hashes are compared by bands, in parts by their value where there are
many; candidate pairs are dealt out by their second document, so that each is verified once. A task takes as many hashes,
pairs and sets at a time as fit into its share of the memory; where the clusters are joined, 100 bytes for each pair of
near-duplicates are needed besides.
Source: Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, PartStage, ShardStage
from megalm.corpus.dedup.files import count_dealt, deal, load, load_dealt, name_shard_file, save
from megalm.corpus.dedup.removal import RECORD, Removals, read_table, save_records
from megalm.corpus.dedup.shingles import hash_bands, jaccard, make_shingles
from megalm.corpus.suffix import load_native
from megalm.data.mixing import mix

# 21 bands of 6: a pair of similarity 0.8 shares a bucket with probability 0.998, one of 0.7 with 0.92, one of 0.4 with 0.08
BANDS, ROWS = 21, 6
ALL_PAIRS = 32  # in a larger bucket each document is compared with the first and with its neighbour only
# What a task needs in bytes: for each hash that it compares, for each candidate pair where it is found or verified
HASH_BYTES, PAIR_BYTES = 72, 160
PAIRS = 4  # for each document, for how many parts to deal the pairs to; more come in several turns
EDGE = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f8")])
WHY = "Jaccard similarity {value:.3f} to document {other} of the same cluster"
# The hash functions of the signatures: multiply and add modulo 2^32, by odd multipliers.
_DRAWN = mix(np.arange(1, 2 * BANDS * ROWS + 1, dtype=np.uint64)).astype(np.uint32).reshape(2, BANDS, ROWS)
_FACTORS, _ADDENDS = _DRAWN[0] | np.uint32(1), _DRAWN[1]


@dataclass(frozen=True)
class _Near:
    threshold: float
    words: int


def find_near_duplicates(corpus: Corpus, threshold: float = 0.8, words: int = 5) -> tuple[Removals, np.ndarray]:
    """Find documents to remove, and the verified pairs that decided it.

    Shapes: -> EDGE [pairs], sorted
    Errors: ConfigError if a number does not fit.
    """
    if not 0.0 < threshold <= 1.0 or words < 1:
        raise ConfigError(
            f"--threshold is {threshold} and --words {words}: the one lies above 0 and up to 1, the other is at least 1."
        )
    wanted = _Near(threshold, words)
    corpus.each_shard(_sign_shard, wanted, "signatures")
    half = corpus.share // 2
    hashes = max(half // HASH_BYTES, 1)  # compared at a time
    together = min(max(hashes // max(corpus.documents, 1), 1), BANDS)  # bands in a task
    splits = max(1, -(-corpus.documents // hashes))
    dealers = -(-BANDS // together) * splits
    parts = max(min(4, len(corpus.shards)), len(corpus.shards) // 4)  # that candidate pairs are dealt to
    parts = max(parts, -(-PAIRS * corpus.documents * PAIR_BYTES // half))
    turns = corpus.each_part(_pair_part, dealers, (together, splits, parts, half), "candidates")
    lists = [f"pairs.{dealer:06d}.{turn}" for dealer, count in enumerate(turns) for turn in range(count)]
    save(os.path.join(corpus.folder, "lists"), np.frombuffer("\n".join(lists).encode(), np.uint8))
    corpus.each_part(_verify_part, parts, (wanted, parts, half), "verifying")
    edges = np.concatenate([load(os.path.join(corpus.folder, f"edges.{part:06d}"), EDGE) for part in range(parts)])
    edges = edges[np.lexsort((edges["second"], edges["first"]))]
    save_records(os.path.join(corpus.folder, "near.removals"), cluster(edges))
    return read_table(corpus, ["near.removals"], WHY), edges


def _sign_shard(stage: ShardStage) -> int:
    """Leaves the shard's sets, where each document's set ends, and its band hashes [BANDS, documents]."""
    names = [stage.path(f"{part}.{os.getpid()}.partial") for part in ("sets", "ends", *map(str, range(BANDS)))]
    documents = end = 0
    with contextlib.ExitStack() as files:
        sets, ends, *bands = (files.enter_context(open(name, "wb")) for name in names)
        ends.write(np.zeros(1, "<i8").data)
        for texts in stage.batches():
            values, offsets = make_shingles(texts, stage.argument.words)
            sets.write(values.data)
            ends.write((offsets[1:] + end).astype("<i8").data)
            for band, hashes in zip(bands, hash_bands(values, offsets, _FACTORS, _ADDENDS), strict=True):
                band.write(np.ascontiguousarray(hashes).data)
            documents, end = documents + len(texts), end + int(offsets[-1])
    first = names[2]
    with open(first, "ab") as whole:  # the bands one after another
        for name in names[3:]:
            with open(name, "rb") as part_of_it:
                shutil.copyfileobj(part_of_it, whole, 1 << 20)
            os.unlink(name)
    for name, part in ((names[0], "sets"), (names[1], "ends"), (first, "bands")):
        os.replace(name, stage.path(part))
    return documents


def _pair_part(task: PartStage) -> int:
    """Candidate pairs of some bands among the hashes of one split, dealt to the parts that verify them, in so many turns."""
    together, splits, parts, room = task.argument
    group, split = divmod(task.part, splits)
    bands = range(group * together, min((group + 1) * together, BANDS))
    none = hash_bands(np.empty(0, np.uint64), np.zeros(2, np.int64), _FACTORS, _ADDENDS)[bands[0], 0]
    numbers, hashes = [np.empty(0, np.int64)], [np.empty((len(bands), 0), np.uint64)]
    for shard, first in enumerate(task.starts[:-1]):
        count = task.starts[shard + 1] - first
        rows = load(name_shard_file(task.folder, shard, "bands"), "<u8", bands.start * count, bands.stop * count)
        rows = rows.reshape(len(bands), count)
        mine = rows[0] != none  # a document without words is like no other
        if splits > 1:  # and then one band
            mine &= mix(rows[0]) % np.uint64(splits) == np.uint64(split)
        numbers.append(np.flatnonzero(mine) + first)
        hashes.append(rows[:, mine])
    whole = np.concatenate(hashes, axis=1)
    del hashes
    turn = -1
    for turn, pairs in enumerate(_candidates(whole, np.concatenate(numbers), max(room // PAIR_BYTES, 1))):
        deal(pairs[:, 1] % parts, parts, pairs, os.path.join(task.folder, f"pairs.{task.part:06d}.{turn}"))
    return turn + 1


def _candidates(hashes: np.ndarray, numbers: np.ndarray, most: int = 1 << 62) -> Iterator[np.ndarray]:
    """Pairs that share a bucket of any band, the smaller number first, about `most` at a time, among which each is once.
    Documents are known by the first bits of their hashes, so that a few pairs more than need be may be among them.

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
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    low = (np.uint64(1) << bits) - np.uint64(1)
    documents = (keys & low).ravel()
    counts = np.cumsum(np.where(sizes > ALL_PAIRS, 2 * sizes, sizes * (sizes - 1) // 2))
    at = 0
    while at < len(starts):
        before = int(counts[at - 1]) if at else 0
        stop = max(at + 1, int(np.searchsorted(counts, before + most, side="right")))
        found = [documents[a] << bits | documents[b] for a, b in _places_of_pairs(starts[at:stop], sizes[at:stop])]
        pairs = np.sort(np.concatenate(found))
        pairs = pairs[np.append(pairs[1:] != pairs[:-1], True)[: len(pairs)]]
        yield np.stack((numbers[pairs >> bits], numbers[pairs & low]), axis=1)
        at = stop


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
            bounds = np.memmap(name_shard_file(self._folder, shard, "ends"), "<i8", "r")
            local = numbers[part] - self._starts[shard]
            begins[part], ends[part] = bounds[local], bounds[local + 1]
            if shard not in self._values:
                self._values[shard] = np.memmap(name_shard_file(self._folder, shard, "sets"), "<u8", "r")
        return shards, begins, ends

    def sizes(self, pairs: np.ndarray) -> np.ndarray:
        """Bytes of the sets of both. Shapes: int64 [pairs, 2] -> int64 [pairs]"""
        return 8 * sum(ends - begins for _, begins, ends in (self._locate(numbers) for numbers in pairs.T))

    def similarities(self, pairs: np.ndarray) -> np.ndarray:
        """Shapes: int64 [pairs, 2] of documents with words -> float64 [pairs]"""
        located = [self._locate(numbers) for numbers in pairs.T]
        library = load_native()
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
    wanted, parts, room = task.argument
    lists = load(os.path.join(task.folder, "lists"), np.uint8).tobytes().decode().split()
    paths = [os.path.join(task.folder, name) for name in lists]
    pair = np.dtype(("<i8", 2))
    turns = max(1, -(-sum(count_dealt(path, task.part) for path in paths) * PAIR_BYTES // room))
    edges = [np.empty(0, EDGE)]
    for turn in range(turns):
        found = [np.empty((0, 2), np.int64)]
        for path in paths:
            pairs = load_dealt(path, task.part, pair).reshape(-1, 2)
            found.append(pairs if turns == 1 else pairs[pairs[:, 1] // parts % turns == turn])
        pairs = np.concatenate(found)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        pairs = pairs[np.append(True, (np.diff(pairs, axis=0) != 0).any(axis=1))[: len(pairs)]]
        edges += _verified(task, pairs, wanted.threshold, room)
    whole = np.concatenate(edges)
    save(os.path.join(task.folder, f"edges.{task.part:06d}"), whole)
    return len(whole)


def _verified(task: PartStage, pairs: np.ndarray, threshold: float, room: int) -> Iterator[np.ndarray]:
    """The pairs that are similar enough, some at a time: those whose sets together take the room."""
    sizes = np.cumsum(_Sets(task.folder, task.starts).sizes(pairs) + PAIR_BYTES) if len(pairs) else np.empty(0)
    start = 0
    while start < len(pairs):
        before = int(sizes[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(sizes, before + room, side="right")))
        part = pairs[start:stop]
        similarity = _Sets(task.folder, task.starts).similarities(part)  # which unmaps what the last ones looked at
        near = similarity >= threshold
        rows = np.empty(int(near.sum()), EDGE)
        rows["first"], rows["second"], rows["similarity"] = part[near, 0], part[near, 1], similarity[near]
        yield rows
        start = stop


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
