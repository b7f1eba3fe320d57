"""Documents that mean the same: k-means over embeddings, and inside a cluster every pair by its cosine (SemDeDup).

Embeddings are the user's (.npy, a row a document), or made here without any model: words and pairs of words, weighted by
TF-IDF, projected to DIMENSIONS by random signs. Clusters are learned on a sample; each shard deals its vectors to their
clusters, and each cluster is compared by itself. Memory: a cluster's vectors, and the sample's.
Source: Abbas et al. 2023, arXiv:2303.09540; Achlioptas 2003 (projection by signs).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, PartStage, ShardStage
from megalm.corpus.dedup.files import deal_some, load, save
from megalm.corpus.dedup.removal import RECORD, Removals, read_table, save_records
from megalm.corpus.dedup.shingles import make_shingles, mix
from megalm.corpus.dedup.texts import Texts

DIMENSIONS = 128  # of the embeddings made here: a cosine is off by about 1 / sqrt(128) at 0, by far less near 1
BINS = 1 << 16  # that the frequencies of words are counted in
SAMPLE = 1 << 16  # vectors that clusters are learned on
PER_CLUSTER = 2000  # documents, if the number of clusters is not given
ITERATIONS = 10
FEATURES = 1 << 15  # projected at a time: 16 MB
ROWS = 1 << 13  # vectors copied at a time
BLOCK = 2048  # documents of a cluster compared at a time with those before them
KEEP = ("first", "far", "near")
WHY = "cosine {value:.4f} to document {other}"


@dataclass(frozen=True)
class _Task:
    embeddings: str | None
    starts: tuple[int, ...]
    threshold: float
    clusters: int
    keep: str


def find_semantic_duplicates(
    corpus: Corpus,
    embeddings: str | None = None,
    threshold: float = 0.95,
    clusters: int | None = None,
    keep: str = "first",
) -> Removals:
    """Find documents that are closer than `threshold` to one that comes before them in the order of `keep`: first in the
    input, far from the cluster's centre (as in the paper) or near to it.

    Errors: ConfigError if a number or the embeddings do not fit.
    """
    if not 0.0 < threshold <= 1.0 or keep not in KEEP or (clusters is not None and clusters < 1):
        raise ConfigError(
            f"--threshold is {threshold}, --keep {keep!r} and --clusters {clusters}: the first lies above 0 and up to 1, "
            f"the second is one of {', '.join(KEEP)}, the third at least 1."
        )
    if embeddings is not None:
        corpus.each_shard(_count_only)
        _check(embeddings, corpus.documents)
    else:
        frequencies = np.zeros(BINS, np.int64)
        for shard, _ in enumerate(corpus.each_shard(_count_shard, None, "words")):
            frequencies += load(os.path.join(corpus.folder, f"{shard:06d}.frequencies"), "<i8")
        weights = np.log((1 + corpus.documents) / (1 + frequencies)) + 1
        save(os.path.join(corpus.folder, "weights"), weights.astype("<f4"))
    number = clusters or max(1, -(-corpus.documents // PER_CLUSTER))
    task = _Task(embeddings and os.path.abspath(embeddings), corpus.starts, threshold, number, keep)
    dimensions = max(corpus.each_shard(_embed_shard, task, "embeddings"), default=(0, 0))[1]
    centres = _centres(_sample(corpus, dimensions), min(number, max(corpus.documents, 1)))
    save(os.path.join(corpus.folder, "centres"), centres)
    corpus.each_shard(_assign_shard, (task, dimensions, len(centres)), "clusters")
    paths = corpus.each_part(_compare_cluster, len(centres), (task, dimensions))
    return read_table(corpus, paths, WHY)


def _check(path: str, documents: int) -> None:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path}: not a readable .npy file ({error}). Save one row a document by numpy.save."
        ) from error
    if array.ndim != 2 or array.shape[0] != documents or not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(
            f"{path}: holds {array.dtype} {list(array.shape)}, but there are {documents} documents: give floating point "
            "numbers with one row a document, in the order of the input."
        )


def _count_only(stage: ShardStage) -> int:
    return sum(len(texts) for texts in stage.batches())


def _features(texts: Texts | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Words and pairs of words, each once a document. Shapes: -> uint64 [all], offsets int64 [texts + 1]"""
    ones, one_ends = make_shingles(texts, 1)
    twos, two_ends = make_shingles(texts, 2)
    number = np.arange(len(texts))
    owner = np.concatenate((np.repeat(number, np.diff(one_ends)), np.repeat(number, np.diff(two_ends))))
    order = np.argsort(owner, kind="stable")
    return np.concatenate((ones, mix(twos)))[order], one_ends + two_ends


def _count_shard(stage: ShardStage) -> tuple[int, int]:
    frequencies = np.zeros(BINS, np.int64)
    count = 0
    for texts in stage.batches():
        frequencies += np.bincount((_features(texts)[0] % np.uint64(BINS)).astype(np.int64), minlength=BINS)
        count += len(texts)
    save(stage.path("frequencies"), frequencies.astype("<i8"))
    return count, 0


def embed(texts: Texts | Sequence[str], weights: np.ndarray) -> np.ndarray:
    """Unit vectors of the texts; of a text without words, zeros. Shapes: weights [BINS] -> float32 [texts, DIMENSIONS]"""
    values, ends = _features(texts)
    scale = weights[(values % np.uint64(BINS)).astype(np.int64)]
    out = np.zeros((len(texts), DIMENSIONS), np.float32)
    owner = np.repeat(np.arange(len(texts)), np.diff(ends))
    for start in range(0, len(values), FEATURES):
        part = slice(start, start + FEATURES)
        words = np.stack([mix(values[part] + np.uint64(k + 1)) for k in range(DIMENSIONS // 64)], axis=1)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
        signs = (bits.astype(np.float32) * 2 - 1) * scale[part, None]
        first = np.flatnonzero(np.diff(owner[part], prepend=-1))
        out[owner[part][first]] += np.add.reduceat(signs, first, axis=0)
    return _unit(out)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def _embed_shard(stage: ShardStage) -> tuple[int, int]:
    """Leaves the shard's unit vectors; (documents, dimensions)"""
    task: _Task = stage.argument
    start, stop = task.starts[stage.shard.number : stage.shard.number + 2]
    if task.embeddings is None:
        weights = load(os.path.join(stage.folder, "weights"), "<f4")
        parts = (embed(texts, weights) for texts in stage.batches())
        dimensions = DIMENSIONS
    else:
        given = np.load(task.embeddings, mmap_mode="r")
        parts = (_own(given[at : min(at + ROWS, stop)], at, task.embeddings) for at in range(start, stop, ROWS))
        dimensions = given.shape[1]
    partial = f"{stage.path('vectors')}.{os.getpid()}.partial"
    with open(partial, "wb") as file:
        for vectors in parts:
            file.write(vectors.data)
    os.replace(partial, stage.path("vectors"))
    return stop - start, dimensions


def _own(rows: np.ndarray, start: int, path: str) -> np.ndarray:
    """The user's rows as unit vectors."""
    rows = np.asarray(rows, np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ConfigError(f"{path}: row {start + bad[0]} holds a number that is not finite. Mend it.")
    return _unit(rows)


def _vectors(folder: str, shard: int, dimensions: int) -> np.ndarray:
    path = os.path.join(folder, f"{shard:06d}.vectors")
    if not os.path.getsize(path):
        return np.empty((0, dimensions), np.float32)
    return np.memmap(path, "<f4", "r").reshape(-1, dimensions)


def _sample(corpus: Corpus, dimensions: int) -> np.ndarray:
    """Every nth document, in all SAMPLE at most."""
    step = max(1, -(-corpus.documents // SAMPLE))
    parts = [
        np.asarray(_vectors(corpus.folder, shard, dimensions)[-start % step :: step])
        for shard, start in enumerate(corpus.starts[:-1])
    ]
    return np.concatenate(parts) if parts else np.empty((0, dimensions), np.float32)


def _centres(sample: np.ndarray, number: int) -> np.ndarray:
    """Unit centres by k-means on the sphere, from sampled vectors. Shapes: [N, D] -> float32 [number, D]"""
    rng = np.random.default_rng(1)
    number = max(1, min(number, len(sample)))
    if len(sample) == 0:
        return np.zeros((1, sample.shape[1]), np.float32)
    centres = sample[np.sort(rng.choice(len(sample), number, replace=False))].copy()
    for _ in range(ITERATIONS if number > 1 else 1):
        nearest = _nearest(sample, centres)
        sums = np.zeros_like(centres, np.float64)
        np.add.at(sums, nearest, sample)
        filled = np.bincount(nearest, minlength=number) > 0
        centres[filled] = _unit(sums[filled])
    return centres


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    parts = [np.argmax(vectors[at : at + BLOCK] @ centres.T, axis=1) for at in range(0, len(vectors), BLOCK)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _record(dimensions: int) -> np.dtype:
    return np.dtype([("number", "<i8"), ("vector", "<f4", (dimensions,))])


def _assign_shard(stage: ShardStage) -> int:
    task, dimensions, clusters = stage.argument
    vectors = _vectors(stage.folder, stage.shard.number, dimensions)
    centres = load(os.path.join(stage.folder, "centres"), "<f4").reshape(clusters, dimensions)
    nearest = _nearest(vectors, centres)

    def rows(numbers: np.ndarray) -> np.ndarray:
        some = np.empty(len(numbers), _record(dimensions))
        some["number"], some["vector"] = numbers, vectors[numbers]
        return some

    deal_some(nearest, clusters, rows, ROWS, stage.path("semantic"))
    return len(vectors)


def _compare_cluster(stage: PartStage) -> str:
    """Each document with those before it in the order of `keep`; a document without words is no duplicate."""
    task, dimensions = stage.argument
    found = [np.empty(0, _record(dimensions))]
    for first, rows in stage.dealt("semantic", _record(dimensions)):
        rows["number"] += first
        found.append(rows)
    rows = np.concatenate(found)
    rows = rows[np.linalg.norm(rows["vector"], axis=1) > 0]
    if task.keep != "first" and len(rows):
        centre = load(os.path.join(stage.folder, "centres"), "<f4").reshape(-1, dimensions)[stage.part]
        closeness = rows["vector"] @ centre
        rows = rows[np.lexsort((rows["number"], closeness if task.keep == "far" else -closeness))]
    vectors = np.ascontiguousarray(rows["vector"])
    best, cosine = np.full(len(rows), -1), np.zeros(len(rows))
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        for before in range(0, stop, BLOCK):
            products = vectors[start:stop] @ vectors[before : before + BLOCK].T
            if before == start:
                products[np.triu_indices(stop - start)] = -2  # not with itself, nor with those after
            nearest = np.argmax(products, axis=1)
            values = products[np.arange(stop - start), nearest]
            better = values > np.where(best[start:stop] < 0, task.threshold - 1e-6, cosine[start:stop])
            best[start:stop][better] = nearest[better] + before
            cosine[start:stop][better] = values[better]
    root = np.arange(len(rows))
    gone = np.flatnonzero(best >= 0)
    for at in gone:
        root[at] = root[best[at]]
    removed = np.zeros(len(gone), RECORD)
    removed["number"], removed["of"] = rows["number"][gone], rows["number"][root[gone]]
    removed["other"], removed["value"] = rows["number"][best[gone]], cosine[gone]
    name = f"semantic.{stage.part:06d}.removals"
    save_records(os.path.join(stage.folder, name), removed)
    return name
