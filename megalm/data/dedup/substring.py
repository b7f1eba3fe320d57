"""Repeated spans of tokens: every span of `length` tokens or more that occurred before, in any document, is cut out.

The result is that of a suffix array with a threshold (Lee et al. 2022, arXiv:2107.06499), without one: all windows of
`length` tokens are hashed to 64 bits, the hashes are dealt to partitions on disk and each partition is sorted; a window
whose hash came before is compared with that place token by token, so no collision removes anything. Memory is that of one
partition, and of the places that are found.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.look import window_hashes
from megalm.data.order import mix
from megalm.data.tokens import TokenFile, TokenWriter

CHUNK = 1 << 21  # tokens hashed at a time
PARTITION_TOKENS = 1 << 23  # windows sorted at a time: 16 bytes each, and the sort's copy
_RECORD = np.dtype([("hash", "<u8"), ("place", "<i8")])


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


def _windows(file: TokenFile, length: int, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hash, place) of every window that lies inside one document."""
    for begin in range(0, file.num_tokens - length + 1, CHUNK):
        stop = min(begin + CHUNK, file.num_tokens - length + 1)
        places = np.arange(begin, stop)
        ends = starts[np.searchsorted(starts, places, side="right")]
        inside = places + length <= ends
        hashes = mix(window_hashes(file.read(begin, stop + length - 1), length))
        yield hashes[inside], places[inside]


def repeated_windows(file: TokenFile, length: int, folder: str) -> Iterator[np.ndarray]:
    """Partition by partition: places of windows that occurred before, and the first place. Shapes: -> int64 [N, 2]"""
    starts = _document_starts(file)
    partitions = max(1, -(-file.num_tokens // PARTITION_TOKENS))
    paths = [os.path.join(folder, str(part)) for part in range(partitions)]
    for hashes, places in _windows(file, length, starts):
        owner = (hashes % np.uint64(partitions)).astype(np.int64)
        for part in range(partitions):
            mine = owner == part
            records = np.empty(int(mine.sum()), _RECORD)
            records["hash"], records["place"] = hashes[mine], places[mine]
            with open(paths[part], "ab") as out:
                out.write(records.tobytes())
    for path in paths:
        if not os.path.exists(path):
            continue
        records = np.fromfile(path, _RECORD)
        os.unlink(path)
        order = np.argsort(records["hash"], kind="stable")  # places rise inside a hash
        hashes, places = records["hash"][order], records["place"][order]
        new = np.concatenate(([True], hashes[1:] != hashes[:-1]))
        first = places[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
        again = ~new & (places >= first + length)  # one that overlaps its own first occurrence would cut that away, too
        yield _confirmed(file, places[again], first[again], length)


def _confirmed(file: TokenFile, places: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    equal = np.ones(len(places), bool)
    for at in range(0, len(places), 1 << 18):
        part = slice(at, at + (1 << 18))
        for offset in range(length):
            equal[part] &= file.tokens[places[part] + offset] == file.tokens[first[part] + offset]
    return np.stack((places[equal], first[equal]), axis=1)


def repeated_token_spans(file: TokenFile, length: int = 50) -> list[Span]:
    """All spans to cut, in the file's order, touching and overlapping ones joined.

    Errors: ConfigError if the length is below 2.
    """
    if length < 2:
        raise ConfigError(f"--length is {length}: a span has at least 2 tokens.")
    with tempfile.TemporaryDirectory(prefix="dedup-") as folder:
        found = list(repeated_windows(file, length, folder))
    windows = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    if len(windows) == 0:
        return []
    windows = windows[np.argsort(windows[:, 0])]
    places, first = windows[:, 0], windows[:, 1]
    starts = _document_starts(file)
    document = np.searchsorted(starts, places, side="right") - 1
    breaks = (places[1:] > places[:-1] + length) | (document[1:] != document[:-1])
    begin = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    end = np.append(begin[1:], len(places)) - 1
    return [
        Span(int(document[b]), int(places[b]), int(places[e]) + length, int(first[b]))
        for b, e in zip(begin, end, strict=True)
    ]


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
