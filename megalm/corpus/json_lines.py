"""Many JSON lines at once, as the bytes of their texts: common lines in C++ (csrc/json_lines), the others in Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megalm.corpus.archives import Unreadable, read_some
from megalm.corpus.documents import (
    BadDocument,
    Document,
    Piece,
    describe_damage,
    explain_failed_reads,
    read_json_line,
)
from megalm.corpus.files import LINE_ENDINGS, find_ending, open_bytes
from megalm.corpus.suffix import load_native

BLOCK = 1 << 21  # bytes read at a time; a longer line is read whole
BLANK, ASCII, TEXT, OTHER = range(4)  # as csrc/json_lines/op.h has them
NEWLINE = 10


@dataclass(frozen=True)
class Lines:
    """The documents of some lines of a file, and what could not be read.

    Shapes: data uint8 [bytes]; ends, begins, sizes int64 [documents]; ascii bool [documents]
    """

    data: np.ndarray
    """The texts in UTF-8, one after another."""
    ends: np.ndarray
    """Where each text ends in `data`."""
    ascii: np.ndarray
    """Whether it has no other characters."""
    begins: np.ndarray
    """The byte of the file at which its line begins."""
    sizes: np.ndarray
    """Bytes of the line, negative where it holds the text alone and no object."""
    bad: list[tuple[int, BadDocument]]
    """What could not be read, with the number of documents before it."""
    block: bytes = b""
    """The lines that all of this was read from."""
    offset: int = 0
    """The byte of the file at which they begin."""

    def line(self, number: int) -> bytes:
        """The line of a document, as it is."""
        begin = int(self.begins[number]) - self.offset
        return self.block[begin : begin + abs(int(self.sizes[number]))]


def holds_lines(piece: Piece) -> bool:
    """Whether each line of the file is a document."""
    return find_ending(piece.path) in LINE_ENDINGS


def read_texts(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    """Read the documents of a piece of JSON lines one by one, with their texts alone: without the other fields."""
    for lines in read_lines(piece, field):
        data, begin, bad = lines.data.data, 0, iter([*lines.bad, (-1, None)])
        before, wrong = next(bad)
        for number, (end, place) in enumerate(zip(lines.ends.tolist(), lines.begins.tolist(), strict=True)):
            while before == number and wrong is not None:
                yield wrong
                before, wrong = next(bad)
            yield Document(str(data[begin:end], "utf-8"), f"byte {place}", {})
            begin = end
        while wrong is not None:
            yield wrong
            _, wrong = next(bad)


def read_lines(piece: Piece, field: str) -> Iterator[Lines]:
    """Read the documents of a piece of JSON lines, the same as `documents.read_piece` gives, some megabytes at a time.

    Errors: ConfigError if the file is not there or cannot be read.
    """
    with explain_failed_reads(piece.label):
        try:
            with open_bytes(piece.path, piece.plain) as file:
                for offset, block in _blocks(file, piece):
                    yield parse(block, piece.base + offset, field)
        except Unreadable as error:
            none = np.empty(0, np.int64)
            yield Lines(np.empty(0, np.uint8), none, np.empty(0, bool), none, none, [(0, describe_damage(error))])


def _blocks(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of the lines that begin inside the piece."""
    offset = piece.start
    if piece.start:
        file.seek(piece.start - 1)
        offset += len(file.readline()) - 1  # the line before belongs to the piece before
    while piece.stop < 0 or offset < piece.stop:
        block = read_some(file, BLOCK if piece.stop < 0 else min(BLOCK, piece.stop - offset))
        if not block:
            return
        if not block.endswith(b"\n"):
            try:
                block += file.readline()
            except Unreadable:
                if b"\n" in block:
                    yield offset, block[: block.rindex(b"\n") + 1]
                raise
        yield offset, block
        offset += len(block)


def parse(block: bytes, offset: int, field: str) -> Lines:
    """Parse the documents of whole lines, the first of which begins at byte `offset` of its file."""
    text, begins, ends, kinds = _scan(block, field)
    sizes = np.diff(begins, append=len(block))
    lengths = np.diff(ends, prepend=0)
    is_document, is_ascii = (kinds == ASCII) | (kinds == TEXT), kinds == ASCII
    parts, at, bad = [], 0, []
    for line in np.flatnonzero(kinds == OTHER).tolist():
        begin = int(begins[line])
        found = read_json_line(block[begin : begin + int(sizes[line])], offset + begin, field)
        if isinstance(found, BadDocument):
            bad.append((line, found))
            continue
        content = found.text.encode("utf-8")
        parts += [text[at : ends[line]], np.frombuffer(content, np.uint8)]
        at, lengths[line] = int(ends[line]), len(content)
        is_document[line], is_ascii[line] = True, found.text.isascii()
        if not found.fields:
            sizes[line] *= -1
    if parts:
        text = np.concatenate([*parts, text[at:]])
    before = np.cumsum(is_document)
    return Lines(
        text,
        np.cumsum(lengths[is_document]),
        is_ascii[is_document],
        begins[is_document] + offset,
        sizes[is_document],
        [(int(before[line]), found) for line, found in bad],
        block,
        offset,
    )


def _scan(block: bytes, field: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Text, begins, ends and kinds of the lines, as csrc/json_lines/op.h defines them."""
    library = load_native()
    if library is None or "{" in field:  # a template
        return _scan_in_python(block)
    data, key = np.frombuffer(block, np.uint8), np.frombuffer(field.encode("utf-8", "surrogatepass"), np.uint8)
    most = int(np.count_nonzero(data == NEWLINE)) + 1
    text, kinds = np.empty(len(block), np.uint8), np.empty(most, np.uint8)
    begins, ends = np.empty(most, np.int64), np.empty(most, np.int64)
    addresses = (array.ctypes.data for array in (text, begins, ends, kinds))
    count = library.json_lines(data.ctypes.data, len(data), key.ctypes.data, len(key), *addresses)
    used = int(ends[count - 1]) if count else 0
    return text[:used], begins[:count], ends[:count], kinds[:count]


def _scan_in_python(block: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every line that is not blank is left to the whole parser."""
    lines = _split(block)
    begins = np.cumsum([0, *map(len, lines)])[:-1]
    kinds = np.array([OTHER if line.strip() else BLANK for line in lines], np.uint8)
    return np.empty(0, np.uint8), begins, np.zeros(len(lines), np.int64), kinds


def _split(block: bytes) -> list[bytes]:
    parts = [line + b"\n" for line in block.split(b"\n")]
    parts[-1] = parts[-1][:-1]
    return parts if parts[-1] else parts[:-1]
