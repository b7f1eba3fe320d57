"""Where each document of a shard lies, by its number; and what could not be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from megalm.corpus.dedup.files import map_array, name_shard_file
from megalm.corpus.documents import BadDocument

KINDS = ("byte", "row", "line", "item")  # what a document's place counts
# piece: of the shard's; kind: one of KINDS; at: how far; size: of a JSON line its bytes, negative where the line holds
# a text and no object; 0: the document is no line
PLACE = np.dtype([("piece", "<u4"), ("kind", "<u4"), ("at", "<i8"), ("size", "<i8")])


def place_record(piece: int, place: str) -> tuple[int, int, int, int]:
    """The record of a document that is no JSON line, from what its reader calls the place."""
    kind, _, at = place.partition(" ")
    return piece, KINDS.index(kind), int(at), 0


def make_bad_record(piece: int, before: int, bad: BadDocument) -> list[Any]:
    """What could not be read, and the number of the shard's documents before it."""
    return [piece, before, bad.place, bad.reason]


def _opened(folder: str, shard: int) -> tuple[np.ndarray, list[str]]:
    with open(name_shard_file(folder, shard, "paths"), encoding="utf-8") as file:
        return map_array(name_shard_file(folder, shard, "places"), PLACE), json.load(file)


class Places:
    """File and place of any document of a corpus, from what its first stage left in the folder."""

    def __init__(self, folder: str, starts: Sequence[int]):
        self._starts = np.array(starts)
        self._shard = lru_cache(maxsize=4)(partial(_opened, folder))  # what was looked at in them is in memory

    def of(self, numbers: np.ndarray) -> list[dict[str, str]]:
        """Of documents by their numbers in the corpus."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        found: list[dict[str, str]] = [{}] * len(numbers)
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(part) == 0:
                continue
            shard = int(shards[part[0]])
            records, paths = self._shard(shard)
            rows = records[numbers[part] - self._starts[shard]].tolist()
            for place, (piece, kind, at, _) in zip(part.tolist(), rows, strict=True):
                found[place] = {"file": paths[piece], "place": f"{KINDS[kind]} {at}"}
        return found
