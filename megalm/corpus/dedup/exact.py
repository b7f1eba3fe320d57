"""Equal documents: by a 128-bit hash of their text, the first one stays.

Each shard deals its hashes to parts by their value; a part holds every copy of a text. As many parts as fit into a
process's share of the memory are sorted together.
"""

from __future__ import annotations

import os

import numpy as np
import xxhash

from megalm.corpus.dedup.corpus import Corpus, PartStage, ShardStage
from megalm.corpus.dedup.files import deal
from megalm.corpus.dedup.removal import RECORD, Removals, read_table, save_records

PARTS = 1024  # a record takes RECORD_BYTES where it is sorted: 40 million documents a part are within 4 GB
RECORD_BYTES = 100
_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])


def find_exact_duplicates(corpus: Corpus, normalize: bool = False) -> Removals:
    """Find the documents to remove. `normalize`: case and white space make no difference."""
    corpus.each_shard(_hash_shard, normalize, "hashes")
    together = max(1, min(PARTS // 16, PARTS * corpus.share // (RECORD_BYTES * max(corpus.documents, 1))))
    paths = corpus.each_part(_compare_parts, -(-PARTS // together), together)
    return read_table(corpus, paths, "the same text")


def _hash_shard(stage: ShardStage) -> int:
    hashes = bytearray()
    for texts in stage.batches():
        contents = (" ".join(text.lower().split()).encode() for text in texts) if stage.argument else texts.contents()
        hashes += b"".join(map(xxhash.xxh3_128_digest, contents))
    halves = np.frombuffer(hashes, ">u8").reshape(-1, 2)
    records = np.empty(len(halves), _HASH)
    records["high"], records["low"], records["number"] = halves[:, 0], halves[:, 1], np.arange(len(halves))
    deal((records["high"] % np.uint64(PARTS)).astype(np.int64), PARTS, records, stage.path("exact"))
    return len(records)


def _compare_parts(task: PartStage) -> str:
    found = [np.empty(0, _HASH)]
    first_part = task.part * task.argument
    for first, records in task.dealt("exact", _HASH, first_part, min(first_part + task.argument, PARTS)):
        records["number"] += first
        found.append(records)
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows["number"], rows["low"], rows["high"]))]
    same = np.zeros(len(rows), bool)
    same[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    first_of = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))  # of each run of equal hashes
    removed = np.zeros(int(same.sum()), RECORD)
    removed["number"], removed["of"] = rows["number"][same], rows["number"][first_of[same]]
    removed["other"] = removed["of"]
    name = f"exact.{task.part:06d}.removals"
    save_records(os.path.join(task.folder, name), removed)
    return name
