"""Which documents go, and why: a table on disk, and the two lists that are written by it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.data.dedup.corpus import Corpus, ShardStage, place_of, save
from megalm.data.documents import BadDocument

# number: the document that goes; of: the one that stays (-1: evaluation text); value and other: what the reason names
RECORD = np.dtype([("number", "<i8"), ("of", "<i8"), ("other", "<i8"), ("value", "<f8")])


@dataclass(frozen=True)
class Removals:
    """What one way of deduplication decided: files of records, each sorted by number, no number twice.

    `why` is a sentence with {value} and {other}.
    """

    paths: tuple[str, ...]
    why: str

    def records(self, start: int = 0, stop: int = 2**63 - 1) -> np.ndarray:
        """The records of documents [start, stop), sorted by number."""
        parts = [np.empty(0, RECORD)]
        for path in self.paths:
            if os.path.getsize(path):
                table = np.memmap(path, RECORD, "r")
                low, high = np.searchsorted(table["number"], (start, stop))
                parts.append(np.asarray(table[low:high]))
        found = np.concatenate(parts)
        return found[np.argsort(found["number"], kind="stable")]

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """(number, number of the one that stays, reason)"""
        for row in self.records():
            yield int(row["number"]), int(row["of"]), self.reason(row)

    def reason(self, row: np.void) -> str:
        """The sentence for one record."""
        return self.why.format(value=float(row["value"]), other=int(row["other"]))


def save_records(path: str, rows: np.ndarray) -> str:
    """Writes records, sorted by number."""
    save(path, rows[np.argsort(rows["number"], kind="stable")])
    return path


@dataclass(frozen=True)
class Counts:
    """How many documents there were, how many stay, and how many could not be read."""

    documents: int
    removed: int
    bad: int


@dataclass(frozen=True)
class _Lists:
    removals: Removals
    starts: tuple[int, ...]
    keep: bool
    remove: bool


def _write(stage: ShardStage) -> Counts:
    """A stage: the shard's part of both lists."""
    wanted: _Lists = stage.argument
    first = wanted.starts[stage.shard.number]
    rows = iter(wanted.removals.records(first, wanted.starts[stage.shard.number + 1]))
    following = next(rows, None)
    number, gone, bad = first, 0, 0
    mine = f"{os.getpid()}.partial"
    kept_path, removed_path = stage.path("kept"), stage.path("removed")
    with (
        open(f"{kept_path}.{mine}", "w", encoding="utf-8") as kept,
        open(f"{removed_path}.{mine}", "w", encoding="utf-8") as removed,
    ):
        for path, document in stage.shard:
            if isinstance(document, BadDocument):
                bad += 1
                if wanted.remove:
                    entry: dict = {"file": path, "place": document.place, "why": f"cannot be read: {document.reason}"}
                    removed.write(json.dumps(entry, ensure_ascii=False) + "\n")
                continue
            if following is not None and following["number"] == number:
                gone += 1
                if wanted.remove:
                    why = wanted.removals.reason(following)
                    entry = {"file": path, "place": document.place, "number": number, "why": why}
                    of = int(following["of"])
                    if of >= 0:
                        entry["duplicate_of"] = {"number": of, **place_of(stage.folder, wanted.starts, of)}
                    removed.write(json.dumps(entry, ensure_ascii=False) + "\n")
                following = next(rows, None)
            elif wanted.keep:
                record = document.fields if document.fields else {"text": document.text}
                kept.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            number += 1
    os.replace(f"{kept_path}.{mine}", kept_path)
    os.replace(f"{removed_path}.{mine}", removed_path)
    return Counts(number - first, gone, bad)


def write_lists(corpus: Corpus, removals: Removals, output: str | None, removed: str | None) -> Counts:
    """Reads the corpus once more, and writes the documents that stay and the list of those that do not, with the reason.

    A kept document is written with all its fields; a removed one by its place, and the place of the one that it
    duplicates. With `skip_bad` those that could not be read are in the list, too.
    """
    lists = _Lists(removals, corpus.starts, bool(output), bool(removed))
    counts = corpus.each_shard(_write, lists)
    for name, part in ((output, "kept"), (removed, "removed")):
        if name:
            with open(f"{name}.partial", "wb") as whole:
                for shard in corpus.shards:
                    with open(os.path.join(corpus.folder, f"{shard.number:06d}.{part}"), "rb") as file:
                        shutil.copyfileobj(file, whole, 1 << 20)
            os.replace(f"{name}.partial", name)
    total = [sum(getattr(count, name) for count in counts) for name in ("documents", "removed", "bad")]
    return Counts(*total)


def table(corpus: Corpus, paths: list[str], why: str) -> Removals:
    """The removals in these files of the corpus' folder."""
    return Removals(tuple(os.path.join(corpus.folder, path) for path in paths), why)
