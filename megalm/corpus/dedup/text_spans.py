"""Repeated spans of bytes in texts: every span of `length` bytes or more that occurred before, in this or another
document, is cut out of them. How they are found: megalm/corpus/dedup/spans.py.

Cuts are moved inwards to whole characters. On disk waits a copy of the texts, beside what the search needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, ShardStage
from megalm.corpus.dedup.files import load, name_shard_file, save
from megalm.corpus.dedup.places import Places
from megalm.corpus.dedup.removal import (
    Written,
    copy_lines,
    count_unread,
    join,
    list_staying,
    make_bad_rows,
    read_documents_at,
    write_json_row,
)
from megalm.corpus.dedup.spans import Symbols, find_spans
from megalm.corpus.fields import is_one_text, replace_text
from megalm.corpus.json_lines import holds_lines

SHOWN = 200  # characters of what was cut in the list of it


@dataclass(frozen=True)
class Cuts:
    """What was found, and what is left."""

    documents: int
    documents_gone: int
    """Of which nothing but white space would be left."""
    bytes: int
    spans: int
    bytes_cut: int
    bad: int
    listed: tuple[str, ...]
    written: Written


def cut_repeated_text(
    corpus: Corpus, length: int, output: str | None, removed: str | None, chunk: int | None = None
) -> Cuts:
    """Finds the spans of `length` bytes or more; writes the documents without them, and the list of what was cut.

    Errors: ConfigError if the length is below 2, or the field is of several texts, out of which nothing can be cut.
    """
    if length < 2:
        raise ConfigError(f"--bytes is {length}: a span has at least 2 bytes.")
    if not is_one_text(corpus.shards[0].field):
        raise ConfigError(
            f"--field is {corpus.shards[0].field!r}: to cut text out of it, it must be one key or column."
        )
    corpus.each_shard(_lay_out, None, "texts")
    path, starts = (os.path.join(corpus.folder, name) for name in ("text", "starts"))
    (total,) = corpus.stages.run(_lay_together, [(corpus.folder, len(corpus.shards))], "one text")
    for shard in corpus.shards:
        Path(name_shard_file(corpus.folder, shard.number, "text")).unlink(missing_ok=True)
    symbols = Symbols(path, "|u1", starts, os.stat(path).st_mtime_ns)
    spans = find_spans(symbols, length, corpus.stages, chunk)
    save(os.path.join(corpus.folder, "spans"), _to_whole_characters(spans, symbols.opened()[0]))
    wanted = _Wanted(corpus.starts, bool(output), bool(removed))
    counts = corpus.each_shard(_cut_shard, wanted, "writing")
    for name, part in ((output, "kept"), (removed, "removed")):
        if name:
            join(corpus, part, name)
    corpus.results.mark(corpus.files)
    written = Written()
    for *_, one in counts:
        written.add(one)
    _, gone, found, cut = (sum(column) for column in list(zip(*counts, strict=True))[:4])
    return Cuts(corpus.documents, gone, total, found, cut, *count_unread(corpus), written)


def _lay_out(stage: ShardStage) -> int:
    """Leaves the shard's texts one after another, and where each ends."""
    ends = [np.zeros(1, np.int64)]
    partial = stage.path(f"text.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        for texts in stage.batches():
            file.write(texts.data.data)
            ends.append(texts.ends + ends[-1][-1])
    os.replace(partial, stage.path("text"))
    bounds = np.concatenate(ends)
    save(stage.path("ends"), bounds[1:].astype("<i8"))
    return len(bounds) - 1


def _lay_together(task: tuple[str, int]) -> int:
    """All texts in one file, and where each begins in it; how many bytes."""
    folder, shards = task
    at = 0
    partial = os.path.join(folder, f"text.{os.getpid()}.partial")
    bounds = f"{partial}.starts"
    with open(partial, "wb") as whole, open(bounds, "wb") as starts:
        starts.write(np.zeros(1, "<i8").data)
        for shard in range(shards):
            starts.write((load(name_shard_file(folder, shard, "ends"), "<i8") + at).data)
            with open(name_shard_file(folder, shard, "text"), "rb") as file:
                while block := file.read(1 << 22):
                    at += whole.write(block)
    os.replace(bounds, os.path.join(folder, "starts"))
    os.replace(partial, os.path.join(folder, "text"))
    return at


def _to_whole_characters(spans: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The spans without the parts of characters at their ends. Shapes: [spans, 4] -> int64 [spans or fewer, 4]"""
    spans = spans.copy()
    for _ in range(3):  # at most three bytes follow the first one of a character
        inside = _follows(text, spans[:, 1])
        spans[inside, 1] += 1
        spans[inside, 3] += 1
        spans[_follows(text, spans[:, 2]), 2] -= 1
    return spans[spans[:, 1] < spans[:, 2]]


def _follows(text: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether the byte there is inside a character."""
    inside = places < len(text)
    inside[inside] = (text[places[inside]] & 0xC0) == 0x80
    return inside


@dataclass(frozen=True)
class _Wanted:
    starts: tuple[int, ...]
    keep: bool
    remove: bool


def _cut_shard(stage: ShardStage) -> tuple[int, int, int, int, dict[str, Any]]:
    """Leaves the shard's part of both lists: (documents, those that are gone, spans, bytes of them, what was written)"""
    wanted: _Wanted = stage.argument
    first, stop = wanted.starts[stage.shard.number : stage.shard.number + 2]
    path = os.path.join(stage.folder, "spans")
    spans = np.empty((0, 4), np.int64)
    if os.path.getsize(path):
        everything = np.memmap(path, "<i8", "r").reshape(-1, 4)
        low, high = np.searchsorted(everything[:, 0], (first, stop))
        spans = np.asarray(everything[low:high])
    starts = np.memmap(os.path.join(stage.folder, "starts"), "<i8", "r")
    text = np.memmap(os.path.join(stage.folder, "text"), np.uint8, "r") if len(spans) else np.empty(0, np.uint8)
    written = Written()
    rest = {number - first: what for number, what in _texts_left(spans, starts, text)}
    for part, wants in (("kept", wanted.keep), ("removed", wanted.remove)):
        if wants:
            partial = f"{stage.path(part)}.{os.getpid()}.partial"
            with open(partial, "wb", buffering=1 << 20) as file:
                if part == "kept":
                    written = _write_kept(stage, rest, file)
                else:
                    _write_spans(stage, wanted.starts, spans, starts, text, file)
            os.replace(partial, stage.path(part))
    gone = sum(what is None for what in rest.values())
    return stop - first, gone, len(spans), int((spans[:, 2] - spans[:, 1]).sum()), asdict(written)


def _texts_left(spans: np.ndarray, starts: np.ndarray, text: np.ndarray) -> Iterator[tuple[int, str | None]]:
    """(document, its text without its spans; None if nothing is left), for documents with spans"""
    documents, begins = np.unique(spans[:, 0], return_index=True)
    for document, own in zip(documents.tolist(), np.split(spans, begins[1:]), strict=False):  # one part of no spans
        at, stop = starts[document : document + 2].tolist()
        parts = []
        for _, begin, end, _ in own.tolist():
            parts.append(text[at:begin])
            at = end
        left = np.concatenate([*parts, text[at:stop]]).tobytes().decode("utf-8")
        yield document, left if left.strip() else None


def _write_spans(
    stage: ShardStage,
    numbers: tuple[int, ...],
    spans: np.ndarray,
    starts: np.ndarray,
    text: np.ndarray,
    file: BinaryIO,
) -> None:
    """What is cut, and where it was before; and what could not be read, at its place."""
    places, bad = Places(stage.folder, numbers), make_bad_rows(stage)
    first = numbers[stage.shard.number]
    origins = np.searchsorted(starts, spans[:, 3], side="right") - 1
    listed = zip(spans.tolist(), places.of(spans[:, 0]), origins.tolist(), places.of(origins), strict=True)
    for (document, begin, end, before), place, origin, place_of_origin in listed:
        file.writelines(bad(document - first))
        shown = text[begin : min(end, begin + 4 * SHOWN)].tobytes().decode("utf-8", "ignore")[:SHOWN]
        row: dict[str, Any] = {**place, "number": document}
        row |= {"offset": begin - int(starts[document]), "bytes": end - begin, "text": shown}
        row["why"] = f"{end - begin} bytes, the first of which occurred before"
        row["duplicate_of"] = {"number": origin, **place_of_origin, "offset": before - int(starts[origin])}
        file.write(write_json_row(row))
    file.writelines(bad(sys.maxsize))


def _write_kept(stage: ShardStage, rest: dict[int, str | None], file: BinaryIO) -> Written:
    """The documents that have text left, those without spans as they are."""
    shard, written = stage.shard, Written()
    gone = np.array([number for number, text in rest.items() if text is None], np.int64)
    for piece, numbers, places in list_staying(stage, gone):
        if holds_lines(piece):
            texts = {at: text for at, number in enumerate(numbers.tolist()) if (text := rest.get(number))}
            copy_lines(piece, places, file, texts, shard.field)
            continue
        for number, document in read_documents_at(piece, shard, numbers, places, written):
            text = rest.get(number) or document.text
            written.document(file, replace_text(document.fields, shard.field, text))
    return written
