"""Repeated spans of symbols, bytes or tokens: every span of `length` or more that occurred before, in any document.

Suffix arrays of chunks of the symbols, merged by ranges of their windows (Lee et al. 2022, arXiv:2107.06499). The symbols
are mapped into memory and read where they are looked at. A task needs about 11 bytes for each symbol of a chunk, 20 where
everything is repeated, or 20 for each place of a range, which is a quarter of a chunk. On disk wait 4 bytes a symbol, and
16 for each repeated window; the spans that they join to are held, 32 bytes each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megalm.corpus.dedup.files import deal, load, load_dealt, save
from megalm.corpus.dedup.stages import Stages
from megalm.corpus.suffix import build_suffix_array, find_repeats

CHUNK = 1 << 24  # symbols sorted at a time, in about 180 MB
BYTES_A_SYMBOL = 20  # of memory at most, in a chunk
PAIR = np.dtype(("<i8", 2))


def chunk_of(share: int) -> int:
    """How many symbols a task may sort in so many bytes of memory."""
    return max(share // BYTES_A_SYMBOL, 1 << 16)


@dataclass(frozen=True)
class Symbols:
    """Documents one after another in a file.

    `starts`: a file of int64 [documents + 1], where each begins. `changed`: tells the file from what it was before.
    """

    path: str
    dtype: str
    starts: str
    changed: int

    def opened(self) -> tuple[np.ndarray, np.ndarray]:
        """The symbols, mapped into memory, and the starts."""
        return _opened(self)


@lru_cache(maxsize=2)  # a worker may outlive the file
def _opened(symbols: Symbols) -> tuple[np.ndarray, np.ndarray]:
    text = np.memmap(symbols.path, symbols.dtype, "r") if os.path.getsize(symbols.path) else np.empty(0, symbols.dtype)
    return text, load(symbols.starts, "<i8")


@dataclass(frozen=True)
class _Chunk:
    """A task: the windows that begin in symbols [start, stop)."""

    symbols: Symbols
    number: int
    start: int
    stop: int
    length: int
    folder: str

    @property
    def label(self) -> str:
        return f"symbols {self.start} to {self.stop} of {self.symbols.path}"


@dataclass(frozen=True)
class _Range:
    """A task: from each chunk's sorted places those of [begins, ends)."""

    number: int
    chunks: tuple[_Chunk, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"part {self.number} of the windows of {self.chunks[0].symbols.path}"


@dataclass(frozen=True)
class _Joining:
    """A task: the spans that begin in a chunk, out of what so many ranges found."""

    chunk: _Chunk
    ranges: int

    @property
    def label(self) -> str:
        return self.chunk.label


def _file(chunk: _Chunk, part: str) -> str:
    return os.path.join(chunk.folder, f"{chunk.number:06d}.{part}")


def _pairs(folder: str, number: int) -> str:
    return os.path.join(folder, f"windows.{number:06d}")


def _sort_chunk(chunk: _Chunk) -> int:
    """Leaves the chunk's windows that lie inside one document, sorted, relative to its start; how many"""
    symbols, starts = chunk.symbols.opened()
    text = np.asarray(symbols[chunk.start : min(chunk.stop + chunk.length - 1, len(symbols))])
    order = build_suffix_array(text)
    inside = np.zeros(len(text), bool)
    low, high = np.searchsorted(starts, (chunk.start, chunk.stop), side="right")
    begin = chunk.start
    for end in starts[low : high + 1].tolist():
        last = min(end - chunk.length + 1, chunk.stop)
        if last > begin:
            inside[begin - chunk.start : last - chunk.start] = True
        begin = max(begin, end)
        if begin >= chunk.stop:
            break
    places = order[inside[order]].astype(np.int32, copy=False).view(np.uint32)
    save(_file(chunk, "order"), places)
    return len(places)


def _merge_range(task: _Range) -> int:
    """Leaves (place, first place) of windows that occurred before, dealt to the chunks of their places."""
    chunks = task.chunks
    symbols, _ = chunks[0].symbols.opened()
    bounds = zip(chunks, task.begins, task.ends, strict=True)
    lists = [load(_file(chunk, "order"), "<u4", begin, end) for chunk, begin, end in bounds]
    found = find_repeats(symbols, chunks[0].length, lists, [chunk.start for chunk in chunks])
    owner = found[:, 0] // (chunks[0].stop - chunks[0].start)
    deal(owner, len(chunks), found, _pairs(chunks[0].folder, task.number))
    return len(found)


def _join_windows(task: _Joining) -> int:
    """Leaves the chunk's spans, touching and overlapping windows joined: int64 [spans, 4] as `find_spans` gives them."""
    chunk, length = task.chunk, task.chunk.length
    first = np.full(chunk.stop - chunk.start, -1, np.int64)
    for number in range(task.ranges):
        windows = load_dealt(_pairs(chunk.folder, number), chunk.number, PAIR)
        first[windows[:, 0] - chunk.start] = windows[:, 1]
    places = np.flatnonzero(first >= 0).astype(np.uint32)
    steps = np.diff(places)
    breaks = steps > length
    _, starts = chunk.symbols.opened()
    touching = np.flatnonzero(steps == length)  # one document may end there, and another one begin
    nearest = np.searchsorted(starts, places[touching + 1] + np.int64(chunk.start))
    breaks[touching] = starts[np.minimum(nearest, len(starts) - 1)] == places[touching + 1] + np.int64(chunk.start)
    last = np.flatnonzero(np.append(breaks, True)[: len(places)])
    begin = np.concatenate(([0], last[:-1] + 1))[: len(last)].astype(np.int64)
    spans = np.empty((len(last), 4), np.int64)
    spans[:, 1] = places[begin] + np.int64(chunk.start)
    spans[:, 2] = places[last] + np.int64(chunk.start + length)
    spans[:, 3] = first[places[begin]]
    spans[:, 0] = np.searchsorted(starts, spans[:, 1], side="right") - 1
    save(_file(chunk, "spans"), spans)
    return len(spans)


def _cut_by_windows(chunks: list[_Chunk], counts: list[int], parts: int) -> list[list[int]]:
    """Where each part begins in each chunk's places, so that equal windows are in one part. Shapes: -> [parts + 1][chunks]"""
    if parts == 1:
        return [[0] * len(chunks), counts]
    length = chunks[0].length
    symbols, _ = chunks[0].symbols.opened()
    order = [
        np.memmap(_file(c, "order"), "<u4", "r") if n else np.empty(0) for c, n in zip(chunks, counts, strict=True)
    ]
    big_endian = symbols.dtype.newbyteorder(">")

    def window(chunk: int, at: int) -> bytes:
        place = chunks[chunk].start + int(order[chunk][at])
        return np.asarray(symbols[place : place + length]).astype(big_endian).tobytes()

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


def find_spans(symbols: Symbols, length: int, stages: Stages, chunk: int | None = None) -> np.ndarray:
    """Find all spans that occurred before, in the file's order, touching and overlapping ones joined.

    chunk: symbols sorted at a time; the result is the same.
    Shapes: -> int64 [spans, 4]: document; where the span begins and ends in the file; where its first window was before
    """
    text, _ = symbols.opened()
    step = chunk or CHUNK
    chunks = [
        _Chunk(symbols, number, begin, min(begin + step, len(text)), length, stages.folder)
        for number, begin in enumerate(range(0, max(len(text) - length + 1, 0), step))
    ]
    counts = stages.run(_sort_chunk, chunks, "sorting")
    if not sum(counts):
        return np.empty((0, 4), np.int64)
    bounds = _cut_by_windows(chunks, counts, -(-sum(counts) // max(step // 4, 1)))
    ranges = [
        _Range(number, tuple(chunks), tuple(low), tuple(high))
        for number, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    stages.run(_merge_range, ranges, "merging")
    stages.run(_join_windows, [_Joining(chunk, len(ranges)) for chunk in chunks], "joining")
    spans = np.concatenate([load(_file(chunk, "spans"), "<i8").reshape(-1, 4) for chunk in chunks])
    if len(spans) == 0:
        return spans
    # a span over the edge of a chunk is in two parts, which touch or overlap
    apart = (spans[1:, 0] != spans[:-1, 0]) | (spans[1:, 1] > spans[:-1, 2])
    begin = np.flatnonzero(np.append(True, apart))
    whole = spans[begin].copy()
    whole[:, 2] = spans[np.append(begin[1:], len(spans)) - 1, 2]
    return whole
