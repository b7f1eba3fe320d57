"""Repeated spans of tokens: every span of `length` tokens or more that occurred before, in any document, is cut out.

Suffix arrays of chunks of the file, merged by ranges of their windows (Lee et al. 2022, arXiv:2107.06499). A chunk needs
7 bytes a token and its tokens; a range of the merge 20 bytes for each of its RANGE places; the text is mapped into
memory and read where it is looked at. Chunks wait on disk, 4 bytes a token, and the repeated windows, 16 bytes each;
the spans that they join to are held.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.dedup.files import deal, load, save
from megalm.data.engine import Engine, LocalEngine
from megalm.data.suffix import repeats, suffix_array
from megalm.data.tokens import TokenFile, TokenWriter

CHUNK = 1 << 24  # tokens sorted at a time, in about 180 MB
RANGE = 1 << 22  # places merged at a time, about


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of the file, all of document `document`; their first window occurred before at `first`."""

    document: int
    start: int
    stop: int
    first: int


def _document_starts(file: TokenFile) -> np.ndarray:
    starts = np.append(np.asarray(file.pointers) // file.dtype.itemsize, file.num_tokens)
    return starts[np.asarray(file.documents)]


def _opened(prefix: str) -> tuple[TokenFile, np.ndarray]:
    stamp = os.stat(f"{prefix}.bin")
    return _mapped(prefix, stamp.st_mtime_ns, stamp.st_ino)  # a worker may outlive the file


@lru_cache(maxsize=2)
def _mapped(prefix: str, changed: int, node: int) -> tuple[TokenFile, np.ndarray]:
    file = TokenFile(prefix)
    return file, _document_starts(file)


@dataclass(frozen=True)
class _Chunk:
    """A task: the windows that begin in tokens [start, stop)."""

    prefix: str
    number: int
    start: int
    stop: int
    length: int
    folder: str

    @property
    def label(self) -> str:
        return f"tokens {self.start} to {self.stop} of {self.prefix}"


@dataclass(frozen=True)
class _Range:
    """A task: from each chunk's sorted places those of [begins, ends)."""

    prefix: str
    number: int
    chunks: tuple[_Chunk, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"part {self.number} of the windows of {self.prefix}"


def _places(chunk: _Chunk) -> str:
    return os.path.join(chunk.folder, f"{chunk.number:06d}.places")


def _sort_chunk(chunk: _Chunk) -> tuple[int, int]:
    """Leaves the chunk's windows that lie inside one document, sorted, relative to its start; (its number, how many)"""
    file, starts = _opened(chunk.prefix)
    text = np.asarray(file.tokens[chunk.start : min(chunk.stop + chunk.length - 1, file.num_tokens)])
    order = suffix_array(text).astype(np.uint32)
    # how many windows begin at each place of the chunk inside its document
    inside = np.zeros(len(text), bool)
    low, high = np.searchsorted(starts, (chunk.start, chunk.stop), side="right")
    begin = chunk.start
    for end in [*starts[low : high + 1].tolist(), file.num_tokens]:
        last = min(end - chunk.length + 1, chunk.stop)
        if last > begin:
            inside[begin - chunk.start : last - chunk.start] = True
        begin = max(begin, end)
        if begin >= chunk.stop:
            break
    order = order[inside[order]]
    save(_places(chunk), order)
    return chunk.number, len(order)


def _merge_range(task: _Range) -> int:
    """Leaves (place, first place) of windows that occurred before, dealt to the chunks of their places."""
    chunks = task.chunks
    file, _ = _opened(task.prefix)
    lists = [load(_places(c), "<u4", begin, end) for c, begin, end in zip(chunks, task.begins, task.ends, strict=True)]
    found = repeats(file.tokens, chunks[0].length, lists, [chunk.start for chunk in chunks])
    owner = found[:, 0] // (chunks[0].stop - chunks[0].start)
    deal(owner, len(chunks), found, _pairs(chunks[0].folder, task.number))
    return len(found)


def _pairs(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number:06d}.pairs")


@dataclass(frozen=True)
class _Joining:
    """A task: the spans that begin in a chunk, out of what so many ranges found."""

    chunk: _Chunk
    ranges: int

    @property
    def label(self) -> str:
        return self.chunk.label


def _join_windows(task: _Joining) -> tuple[int, np.ndarray]:
    """The chunk's number and its spans, touching and overlapping windows joined. Shapes: -> int64 [spans, 4], as Span"""
    chunk, length = task.chunk, task.chunk.length
    parts = [np.empty((0, 2), np.int64)]
    for number in range(task.ranges):
        path = _pairs(chunk.folder, number)
        start, stop = load(f"{path}.bounds", "<i8", chunk.number, chunk.number + 2)
        if stop > start:
            parts.append(load(path, "<i8", 2 * int(start), 2 * int(stop)).reshape(-1, 2))
    windows = np.concatenate(parts)
    windows = windows[np.argsort(windows[:, 0])]
    places, first = windows[:, 0], windows[:, 1]
    _, starts = _opened(chunk.prefix)
    document = np.searchsorted(starts, places, side="right") - 1
    breaks = (places[1:] > places[:-1] + length) | (document[1:] != document[:-1])
    begin = np.flatnonzero(np.concatenate((np.ones(min(len(places), 1), bool), breaks)))
    end = np.append(begin[1:], len(places))[: len(begin)] - 1
    return chunk.number, np.stack((document[begin], places[begin], places[end] + length, first[begin]), axis=1)


def _cut_by_windows(file: TokenFile, chunks: list[_Chunk], counts: list[int], parts: int) -> list[list[int]]:
    """Where each part begins in each chunk's places, so that equal windows are in one part. Shapes: -> [parts + 1][chunks]"""
    if parts == 1:
        return [[0] * len(chunks), counts]
    length = chunks[0].length
    sorted_places = [
        np.memmap(_places(c), "<u4", "r") if n else np.empty(0) for c, n in zip(chunks, counts, strict=True)
    ]
    big_endian = file.dtype.newbyteorder(">")

    def window(chunk: int, at: int) -> bytes:
        place = chunks[chunk].start + int(sorted_places[chunk][at])
        return np.asarray(file.tokens[place : place + length]).astype(big_endian).tobytes()

    total = sum(counts)
    step = max(total // (parts * 16), 1)  # samples, from each chunk in proportion to its places
    samples = sorted(window(c, at) for c, count in enumerate(counts) for at in range(step // 2, count, step))
    cuts = sorted({samples[len(samples) * part // parts] for part in range(1, parts)}) if samples else []

    def first_not_below(chunk: int, key: bytes) -> int:
        low, high = 0, counts[chunk]
        while low < high:
            middle = (low + high) // 2
            if window(chunk, middle) < key:
                low = middle + 1
            else:
                high = middle
        return low

    return [[0] * len(chunks), *([first_not_below(c, key) for c in range(len(chunks))] for key in cuts), counts]


def _find_spans(file: TokenFile, length: int, folder: str, engine: Engine) -> list[Span]:
    prefix = os.path.abspath(file.prefix)
    begins = range(0, max(file.num_tokens - length + 1, 0), CHUNK)
    chunks = [
        _Chunk(prefix, number, begin, min(begin + CHUNK, file.num_tokens), length, folder)
        for number, begin in enumerate(begins)
    ]
    counts = [count for _, count in sorted(engine.map(_sort_chunk, chunks))]
    if not sum(counts):
        return []
    bounds = _cut_by_windows(file, chunks, counts, -(-sum(counts) // RANGE))
    ranges = [
        _Range(prefix, number, tuple(chunks), tuple(low), tuple(high))
        for number, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    list(engine.map(_merge_range, ranges))
    found = dict(engine.map(_join_windows, [_Joining(chunk, len(ranges)) for chunk in chunks]))
    spans: list[Span] = []
    for number in range(len(chunks)):
        for document, start, stop, first in found[number].tolist():
            if spans and spans[-1].document == document and spans[-1].stop >= start:  # over the edge of a chunk
                spans[-1] = Span(document, spans[-1].start, stop, spans[-1].first)
            else:
                spans.append(Span(document, start, stop, first))
    return spans


def repeated_token_spans(
    file: TokenFile, length: int = 50, engine: Engine | None = None, folder: str | None = None
) -> list[Span]:
    """All spans to cut, in the file's order, touching and overlapping ones joined.

    `folder` is for what waits on disk; it is removed. Errors: ConfigError if the length is below 2.
    """
    if length < 2:
        raise ConfigError(f"--length is {length}: a span has at least 2 tokens.")
    place = os.path.abspath(folder) if folder else tempfile.mkdtemp(prefix="dedup-")
    os.makedirs(place, exist_ok=True)
    try:
        return _find_spans(file, length, place, engine or LocalEngine(1))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def cut_spans(file: TokenFile, spans: list[Span], output: str, removed: str | None = None) -> dict[str, Any]:
    """Writes the file without the spans (a document that is all gone is left out), and the list of what was cut."""
    starts = _document_starts(file)
    by_document: dict[int, list[Span]] = {}
    for span in spans:
        by_document.setdefault(span.document, []).append(span)
    kept = gone = 0
    with TokenWriter(output, file.dtype.newbyteorder("=")) as writer:
        for document in range(file.num_documents):
            at, pieces = int(starts[document]), []
            for span in by_document.get(document, []):
                pieces.append(file.tokens[at : span.start])
                at = span.stop
            pieces.append(file.tokens[at : int(starts[document + 1])])
            tokens = np.concatenate(pieces)
            if len(tokens):
                writer.add_document(tokens)
                kept += 1
            else:
                gone += 1
        if writer.num_documents == 0:
            raise ConfigError(f"{file.prefix}: nothing is left without its repeated spans. Pass a larger --length.")
    if removed:
        with open(removed, "w", encoding="utf-8") as out:
            for span in spans:
                row = {"document": span.document, "token": span.start, "tokens": span.stop - span.start}
                origin = file.document_at(span.first)
                row["duplicate_of"] = {"document": origin, "token": span.first}  # type: ignore[assignment]
                out.write(json.dumps(row) + "\n")
    cut = sum(span.stop - span.start for span in spans)
    return {
        "documents": file.num_documents,
        "documents_gone": gone,
        "tokens": file.num_tokens,
        "spans": len(spans),
        "tokens_cut": cut,
    }
