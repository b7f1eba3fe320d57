"""Equal documents: by a 128-bit hash of their text, the first one stays."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import xxhash

from megalm.data.dedup.removal import Corpus, Removal

PARTITIONS = 64  # of the hashes on disk: each is sorted alone, so memory is a 64th of 24 bytes a document
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])


def exact_duplicates(corpus: Corpus, normalize: bool = False) -> dict[int, Removal]:
    """Numbers of the documents to remove. `normalize`: case and white space make no difference."""
    removals: dict[int, Removal] = {}
    with tempfile.TemporaryDirectory(prefix="dedup-") as folder:
        paths = [os.path.join(folder, str(part)) for part in range(PARTITIONS)]
        waiting: list[list[tuple[int, int, int]]] = [[] for _ in paths]
        number = 0
        for texts in corpus.batches():
            for text in texts:
                content = " ".join(text.lower().split()) if normalize else text
                value = xxhash.xxh3_128_intdigest(content.encode("utf-8", "surrogatepass"))
                high, low = value >> 64, value & (2**64 - 1)
                waiting[high % PARTITIONS].append((high, low, number))
                number += 1
            for path, records in zip(paths, waiting, strict=True):
                with open(path, "ab") as file:
                    file.write(np.array(records, _RECORD).tobytes())
                records.clear()
        for path in paths:
            if not os.path.exists(path):
                continue
            table = np.fromfile(path, _RECORD)
            table = table[np.lexsort((table["number"], table["low"], table["high"]))]
            same = (table["high"][1:] == table["high"][:-1]) & (table["low"][1:] == table["low"][:-1])
            place = np.arange(len(table))
            place[1:][same] = 0
            first = np.maximum.accumulate(place)  # of each record's run of equal hashes
            for at in np.flatnonzero(same) + 1:
                removals[int(table["number"][at])] = Removal(int(table["number"][first[at]]), "the same text")
    return removals
