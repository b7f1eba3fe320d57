"""Which documents go, and why: a table on disk, and the two lists that are written by it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, CorpusShard, ShardStage, explain_read_errors
from megalm.corpus.dedup.files import load, name_shard_file, save, write_whole
from megalm.corpus.dedup.places import KINDS, PLACE, Places
from megalm.corpus.documents import BOM, BadDocument, Document, Piece, read_piece
from megalm.corpus.fields import replace_text
from megalm.corpus.files import open_bytes
from megalm.corpus.json_lines import holds_lines
from megalm.corpus.shards import check_unchanged

WRITTEN = 1 << 12  # rows of the list that are held as Python objects
LISTED = 1000  # documents that could not be read and are named in the outcome; all are counted
# number: the document that goes; of: the one that stays (-1: evaluation text); value and other: what the reason names
RECORD = np.dtype([("number", "<i8"), ("of", "<i8"), ("other", "<i8"), ("value", "<f8")])
_in_utf8 = json.JSONEncoder(ensure_ascii=False, default=str).encode
_in_ascii = json.JSONEncoder(default=str).encode


@dataclass(frozen=True)
class Removals:
    """What one way of deduplication decided: files of records, each sorted by number, no number twice.

    `why` is a sentence with {value} and {other}. `evaluation`: folder and starts of another corpus, whose documents
    `other` then counts.
    """

    paths: tuple[str, ...]
    why: str
    evaluation: tuple[str, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return sum(os.path.getsize(path) for path in self.paths) // RECORD.itemsize

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
        for number, of, other, value in self.records().tolist():
            yield number, of, self.reason(other, value)

    def reason(self, other: int, value: float) -> str:
        """The sentence for one record."""
        return self.why.format(value=value, other=other)


def save_records(path: str, rows: np.ndarray) -> str:
    """Writes records, sorted by number."""
    save(path, rows[np.argsort(rows["number"], kind="stable")])
    return path


@dataclass(frozen=True)
class Counts:
    """How many documents there were, how many go, and how many could not be read, of which some are named; and how many
    of those that stay were not written as they are in the input."""

    documents: int
    removed: int
    bad: int
    listed: tuple[str, ...] = ()
    written: Written = field(default_factory=lambda: Written())


@dataclass
class Written:
    """Of the documents of tables and lists that were written: those with text that is not UTF-8 in another field, whose
    bytes became surrogates, and those without a field that could not be read, of which some are named."""

    escaped: int = 0
    incomplete: int = 0
    listed: list[str] = field(default_factory=list)

    def document(self, file: BinaryIO, fields: dict[str, Any]) -> None:
        """Writes a document's fields as a line."""
        line, escaped = _line(fields)
        file.write(line)
        self.escaped += escaped

    def add(self, other: dict[str, Any]) -> None:
        """What another shard's document says, as `asdict` gives it."""
        self.escaped += other["escaped"]
        self.incomplete += other["incomplete"]
        self.listed = [*self.listed, *other["listed"]][:LISTED]


@dataclass(frozen=True)
class _Lists:
    removals: Removals
    starts: tuple[int, ...]
    keep: bool
    remove: bool


def write_json_row(record: Any) -> bytes:
    """A line of JSON; half of a surrogate pair, which UTF-8 cannot hold, as its escape."""
    return _line(record)[0]


def _line(record: Any) -> tuple[bytes, bool]:
    """The line, and whether there is such a half in it."""
    try:
        return _in_utf8(record).encode("utf-8") + b"\n", False
    except UnicodeEncodeError:
        return _in_ascii(record).encode("ascii") + b"\n", True


def _write(stage: ShardStage) -> tuple[int, dict[str, Any]]:
    """A stage: the shard's part of both lists; how many of its documents go, and what was written of the others."""
    wanted: _Lists = stage.argument
    first, stop = wanted.starts[stage.shard.number : stage.shard.number + 2]
    rows = wanted.removals.records(first, stop)
    written = Written()
    if wanted.remove:
        with _part(stage, "removed") as file:
            _write_removed(stage, wanted, rows, file)
    if wanted.keep:
        with _part(stage, "kept") as file:
            written = _write_kept(stage, rows["number"] - first, file)
    return len(rows), asdict(written)


@contextlib.contextmanager
def _part(stage: ShardStage, part: str) -> Iterator[BinaryIO]:
    partial = f"{stage.path(part)}.{os.getpid()}.partial"
    with open(partial, "wb", buffering=1 << 20) as file:
        yield file
    os.replace(partial, stage.path(part))


def read_bad(folder: str, shard: int) -> list[list[Any]]:
    """Read what could not be read of a shard: piece, number of documents before it, place, reason."""
    with open(name_shard_file(folder, shard, "bad"), encoding="utf-8") as file:
        return json.load(file)


def make_bad_rows(stage: ShardStage) -> Callable[[int], list[bytes]]:
    """Of what could not be read: the lines for all that come before a document (by its number in the shard), each once."""
    rows = iter(read_bad(stage.folder, stage.shard.number))
    following = next(rows, None)

    def before(number: int) -> list[bytes]:
        nonlocal following
        lines = []
        while following is not None and following[1] <= number:
            piece, _, place, reason = following
            path = stage.shard.pieces[piece].label
            lines.append(write_json_row({"file": path, "place": place, "why": f"cannot be read: {reason}"}))
            following = next(rows, None)
        return lines

    return before


def _write_removed(stage: ShardStage, wanted: _Lists, rows: np.ndarray, file: BinaryIO) -> None:
    first = wanted.starts[stage.shard.number]
    places = Places(stage.folder, wanted.starts)
    evaluation = wanted.removals.evaluation and Places(*wanted.removals.evaluation)
    bad = make_bad_rows(stage)
    for start in range(0, len(rows), WRITTEN):
        some = rows[start : start + WRITTEN]
        mine, kept = places.of(some["number"]), iter(places.of(some["of"][some["of"] >= 0]))
        others = evaluation.of(some["other"]) if evaluation else []
        for index, (number, of, other, value) in enumerate(some.tolist()):
            file.writelines(bad(number - first))
            row: dict[str, Any] = {**mine[index], "number": number, "why": wanted.removals.reason(other, value)}
            if of >= 0:
                row["duplicate_of"] = {"number": of, **next(kept)}
            if evaluation:
                row["evaluation"] = {"number": other, **others[index]}
            file.write(write_json_row(row))
    file.writelines(bad(sys.maxsize))


def _write_kept(stage: ShardStage, gone: np.ndarray, file: BinaryIO) -> Written:
    written = Written()
    for piece, numbers, places in list_staying(stage, gone):
        if holds_lines(piece):
            copy_lines(piece, places, file)
            continue
        for _, document in read_documents_at(piece, stage.shard, numbers, places, written):
            written.document(file, document.fields or {"text": document.text})
    return written


def list_staying(stage: ShardStage, gone: np.ndarray) -> Iterator[tuple[Piece, np.ndarray, np.ndarray]]:
    """List the pieces of which something stays: (piece, the numbers in the shard of its documents that stay, their places)"""
    places = load(stage.path("places"), PLACE)
    stays = np.ones(len(places), bool)
    stays[gone] = False
    bounds = np.searchsorted(places["piece"], np.arange(len(stage.shard.pieces) + 1)).tolist()
    for piece, low, high in zip(stage.shard.pieces, bounds[:-1], bounds[1:], strict=True):
        numbers = np.flatnonzero(stays[low:high]) + low
        if len(numbers):
            yield piece, numbers, places[numbers]


def read_documents_at(
    piece: Piece, shard: CorpusShard, numbers: np.ndarray, places: np.ndarray, written: Written
) -> Iterator[tuple[int, Document]]:
    """(number in the shard, document) of the documents at these places of a piece, with all their fields.

    They are told by their places, not by how many were before them: all columns are read now, only the text was before.
    Errors: ConfigError where one of them cannot be read whole, unless the shard leaves out what is bad: then the fields
    that cannot be read are missing, and listed.
    """
    expected = zip(numbers.tolist(), [f"{KINDS[kind]} {at}" for _, kind, at, _ in places.tolist()], strict=True)
    number, place = next(expected)
    for found in explain_read_errors(read_piece(piece, shard.field), piece):
        if found.place != place:
            continue
        if isinstance(found, BadDocument):
            break
        if found.lost and not shard.skip_bad:
            raise ConfigError(
                f"{piece.label}: {place}: {found.lost}. Mend it, or pass --skip-bad to write such documents without it."
            )
        if found.lost:
            written.incomplete += 1
            written.listed += [f"{piece.label}: {place}: {found.lost}"] * (len(written.listed) < LISTED)
        yield number, found
        number, place = next(expected, (-1, ""))
    if place:
        raise ConfigError(
            f"{piece.label}: {place}: was read before, and cannot be read now. Give the command again when nothing writes to "
            "the file; if this comes again, the disk or its connection is at fault."
        )


def copy_lines(
    piece: Piece, places: np.ndarray, file: BinaryIO, texts: Mapping[int, str] | None = None, field: str = "text"
) -> None:
    """The lines at these places as they are; one that is a text alone becomes an object. `texts`: by the index of the
    place, what the field holds instead."""
    begins, sizes = places["at"], places["size"]
    ends = begins + np.abs(sizes)
    alone = sizes < 0
    alone[list(texts or ())] = True
    breaks = np.flatnonzero((begins[1:] != ends[:-1]) | alone[1:] | alone[:-1]) + 1
    firsts, lasts = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(places)])) - 1
    with open_bytes(piece.path, piece.plain) as source:
        at = 0
        for index, begin, end in zip(firsts.tolist(), begins[firsts].tolist(), ends[lasts].tolist(), strict=True):
            if source.seekable():
                source.seek(begin)
            else:
                for _ in _parts(source, begin - at):
                    pass
            at = end
            if alone[index]:
                record = json.loads(source.read(end - begin).removeprefix(BOM if begin == 0 else b""))
                fields = record if isinstance(record, dict) else {}
                file.write(
                    write_json_row(
                        replace_text(fields, field, texts[index]) if texts and index in texts else {"text": record}
                    )
                )
                continue
            for content in _parts(source, end - begin):
                file.write(content)
            if not content.endswith(b"\n"):
                file.write(b"\n")


def _parts(source: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (content := source.read(min(size, 1 << 22))):
        size -= len(content)
        yield content


def write_lists(corpus: Corpus, removals: Removals, output: str | None, removed: str | None) -> Counts:
    """Writes the documents that stay and the list of those that do not, with the reason.

    A JSON line that stays is copied as it is, another document is written with all its fields; a removed one by its
    place, and the place of the one that it duplicates. With `skip_bad` those that could not be read are in the list, too.
    """
    written = Written()
    if output or removed:
        wanted = _Lists(removals, corpus.starts, bool(output), bool(removed))
        for _, found in corpus.each_shard(_write, wanted, "writing"):
            written.add(found)
        for name, part in ((output, "kept"), (removed, "removed")):
            if name:
                join(corpus, part, name)
        corpus.results.mark(corpus.files)
    bad, listed = count_unread(corpus)
    return Counts(corpus.documents, len(removals), bad, listed, written)


def join(corpus: Corpus, part: str, name: str) -> None:
    """The shards' files of this kind, one after another, as one file.

    Errors: ConfigError if the input has changed since the beginning.
    """
    check_unchanged(corpus.files)
    with write_whole(name) as whole:
        for shard in corpus.shards:
            with open(name_shard_file(corpus.folder, shard.number, part), "rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)


def count_unread(corpus: Corpus) -> tuple[int, tuple[str, ...]]:
    """Count how many documents could not be read, and the first of them in words."""
    count, listed = 0, []
    for shard in corpus.shards:
        for piece, _, place, reason in read_bad(corpus.folder, shard.number):
            if count < LISTED:
                listed.append(f"{shard.pieces[piece].label}: {place}: {reason}")
            count += 1
    return count, tuple(listed)


def read_table(
    corpus: Corpus, paths: list[str], why: str, evaluation: tuple[str, tuple[int, ...]] | None = None
) -> Removals:
    """Read the removals in these files of the corpus' folder."""
    return Removals(tuple(os.path.join(corpus.folder, path) for path in paths), why, evaluation)
