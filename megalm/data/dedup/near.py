"""Nearly equal documents: MinHash signatures, banded buckets, verified Jaccard similarity, clusters of which the first stays.

Signatures are rensa's R-MinHash over hashes of runs of words that numpy makes. Each shard leaves its sets and its band
hashes on disk; each band's hashes are compared in parts by their value; candidate pairs are dealt out by their first
document, so that each is verified once. Memory: 16 bytes for each of PART_DOCUMENTS documents in a stage, and where the
clusters are joined, 56 bytes for each document that has a near-duplicate.
Source: Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.dedup.corpus import Corpus, PartStage, ShardStage, deal, load, save, shard_path
from megalm.data.dedup.removal import RECORD, Removals, save_records, table
from megalm.data.dedup.shingles import jaccard, mix, shingles

# 21 bands of 6: a pair of similarity 0.8 shares a bucket with probability 0.998, one of 0.7 with 0.92, one of 0.4 with 0.08
BANDS, ROWS = 21, 6
ALL_PAIRS = 32  # in a larger bucket each document is compared with the first and with its neighbour only
PART_DOCUMENTS = 1 << 22  # whose hashes of one band are compared at a time
SEED = 1
EDGE = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f8")])
WHY = "Jaccard similarity {value:.3f} to document {other} of the same cluster"


@dataclass(frozen=True)
class _Near:
    threshold: float
    words: int


def near_duplicates(corpus: Corpus, threshold: float = 0.8, words: int = 5) -> tuple[Removals, np.ndarray]:
    """Documents to remove, and the verified pairs that decided it.

    Shapes: -> EDGE [pairs], sorted
    Errors: ConfigError without rensa, or if a number does not fit.
    """
    if not 0.0 < threshold <= 1.0 or words < 1:
        raise ConfigError(
            f"--threshold is {threshold} and --words {words}: the one lies above 0 and up to 1, the other is at least 1."
        )
    _rensa()
    wanted = _Near(threshold, words)
    corpus.each_shard(_sign_shard, wanted)
    splits = max(1, -(-corpus.documents // PART_DOCUMENTS))
    parts = max(4, len(corpus.shards) // 4)  # that candidate pairs are dealt to
    corpus.each_part(_pair_part, BANDS * splits, (splits, parts))
    corpus.each_part(_verify_part, parts, (wanted, BANDS * splits))
    edges = np.concatenate([load(os.path.join(corpus.folder, f"edges.{part:06d}"), EDGE) for part in range(parts)])
    edges = np.sort(edges, order=("first", "second"))
    save_records(os.path.join(corpus.folder, "near.removals"), cluster(edges))
    return table(corpus, ["near.removals"], WHY), edges


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError("finding near-duplicates needs rensa: `pip install --no-deps rensa`.") from error
    return rensa


def _sign_shard(stage: ShardStage) -> int:
    """Leaves the shard's sets, where each document's set ends, and its band hashes [BANDS, documents]."""
    rensa = _rensa()
    ends: list[np.ndarray] = [np.zeros(1, np.int64)]
    hashes: list[np.ndarray] = []
    partial = stage.path(f"sets.{os.getpid()}.partial")
    with open(partial, "wb") as sets:
        for texts in stage.batches():
            values, offsets = shingles(texts, stage.argument.words)
            sets.write(values.data)
            hashes.append(_band_hashes(rensa, values, offsets))
            ends.append(offsets[1:] + ends[-1][-1])
    os.replace(partial, stage.path("sets"))
    bounds = np.concatenate(ends)
    save(stage.path("ends"), bounds.astype("<i8"))
    save(stage.path("bands"), np.concatenate(hashes, axis=1) if hashes else np.empty((BANDS, 0), np.uint64))
    return len(bounds) - 1


def _band_hashes(rensa: Any, values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Shapes: -> uint64 [BANDS, documents]"""
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(values, offsets.astype(np.uint64), BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, ROWS)
    hashes = np.zeros(rows.shape[:2], np.uint64)
    for row in range(ROWS):
        hashes = mix(hashes + rows[:, :, row] * np.uint64(0x9E3779B97F4A7C15))
    return np.ascontiguousarray(hashes.T)


def _pair_part(task: PartStage) -> int:
    """Candidate pairs of one band among the hashes of one split, dealt to the parts that verify them."""
    splits, parts = task.argument
    band, split = divmod(task.part, splits)
    numbers, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for shard, first in enumerate(task.starts[:-1]):
        count = task.starts[shard + 1] - first
        path = shard_path(task.folder, shard, "bands")
        column = load(path, "<u8", band * count, (band + 1) * count)
        ends = load(shard_path(task.folder, shard, "ends"), "<i8")
        mine = (np.diff(ends) > 0) & (mix(column) % np.uint64(splits) == np.uint64(split))
        numbers.append(np.flatnonzero(mine) + first)
        hashes.append(column[mine])
    pairs = np.array(list(_candidates(np.concatenate(hashes), np.concatenate(numbers))), "<i8").reshape(-1, 2)
    deal(pairs[:, 0] % parts, parts, pairs, os.path.join(task.folder, f"pairs.{task.part:06d}"))
    return len(pairs)


def _candidates(hashes: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs that share a bucket, the smaller number first."""
    order = np.argsort(hashes, kind="stable")
    values = hashes[order]
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1]))) if len(values) else values
    stops = np.append(starts[1:], len(values))
    for start, stop in zip(starts[stops - starts > 1], stops[stops - starts > 1], strict=True):
        bucket = numbers[order[start:stop]].tolist()
        if len(bucket) <= ALL_PAIRS:
            yield from ((a, b) for i, a in enumerate(bucket) for b in bucket[i + 1 :])
        else:
            yield from ((bucket[0], b) for b in bucket[1:])
            yield from zip(bucket, bucket[1:], strict=False)


class _Sets:
    """The sets of all shards by a document's number, mapped into memory."""

    def __init__(self, folder: str, starts: tuple[int, ...]):
        self.starts = np.array(starts)
        self._folder = folder
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, number: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        if shard not in self._open:
            paths = [shard_path(self._folder, shard, part) for part in ("sets", "ends")]
            self._open[shard] = (np.memmap(paths[0], "<u8", "r"), np.memmap(paths[1], "<i8", "r"))
        values, ends = self._open[shard]
        local = number - int(self.starts[shard])
        return values[ends[local] : ends[local + 1]]


def _verify_part(task: PartStage) -> int:
    """The candidate pairs of this part that are similar enough, each once."""
    wanted, dealers = task.argument
    found = [np.empty((0, 2), "<i8")]
    for dealer in range(dealers):
        path = os.path.join(task.folder, f"pairs.{dealer:06d}")
        start, stop = load(f"{path}.bounds", "<i8", task.part, task.part + 2)
        if stop > start:
            found.append(load(path, "<i8", 2 * int(start), 2 * int(stop)).reshape(-1, 2))
    sets = _Sets(task.folder, task.starts)
    edges = []
    for first, second in np.unique(np.concatenate(found), axis=0).tolist():
        similarity = jaccard(sets[first], sets[second])
        if similarity >= wanted.threshold:
            edges.append((first, second, similarity))
    save(os.path.join(task.folder, f"edges.{task.part:06d}"), np.array(edges, EDGE))
    return len(edges)


def cluster(edges: np.ndarray) -> np.ndarray:
    """Connected documents are a cluster, of which the smallest number stays.

    The reason of each other one is its most similar pair (the first of equal ones). Shapes: EDGE [N] -> RECORD [removed]
    """
    nodes, ends = np.unique(np.concatenate((edges["first"], edges["second"])), return_inverse=True)
    ends = ends.reshape(2, -1)
    parent = np.arange(len(nodes))

    def find(item: int) -> int:
        root = item
        while parent[root] != root:
            root = int(parent[root])
        while parent[item] != root:
            parent[item], item = root, int(parent[item])
        return root

    for a, b in ends.T.tolist():
        a, b = find(a), find(b)
        parent[max(a, b)] = min(a, b)
    roots = np.array([find(item) for item in range(len(nodes))], np.int64)
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
