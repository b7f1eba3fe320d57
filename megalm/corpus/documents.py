"""Reading documents out of files: text, JSON lines, JSON, CSV, Parquet, Arrow; compressed or not; local or by URL.

A piece is a file, or a range of bytes or row groups of one; `read_piece` is a pure function of it, so any process can
do any piece.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from megalm.config.errors import ConfigError
from megalm.corpus import tables, web
from megalm.corpus.archives import COMPRESSIONS, Unreadable, read_some
from megalm.corpus.fields import explain_no_text, list_names, look_up_value, take_text
from megalm.corpus.files import (
    ENDINGS,
    LINE_ENDINGS,
    TABLE_ENDINGS,
    WEB_ENDINGS,
    WHOLE_ENDINGS,
    find_ending,
    is_plain,
    name_compression,
    open_bytes,
)
from megalm.corpus.finding import LeftOut, list_files

SMALLEST_PIECE, LARGEST_PIECE = 4 << 20, 64 << 20  # bytes of one file that are read at a time by one process
PIECES = 256  # that a large input is cut into at least: enough for all processes to end together
DEALT = 64  # a compressed file of more than such a share of the input is dealt out in blocks as it is unpacked
LONGEST_TEXT = 8 << 20  # a text file above this is cut at line ends into documents of TEXT_PIECE: a worker needs about
TEXT_PIECE = 4 << 20  # fifteen times a document's size
LONGEST_LINE = 1 << 20  # after so many bytes without a line end a text is cut where it is
BLOCK = 1 << 20  # of a JSON file that is looked at together
LONGEST_VALUE = 64 << 20  # characters of a value in JSON or CSV: beyond it, it is taken for one that does not end
BOM = b"\xef\xbb\xbf"
NO_TEXT = "holds a NUL byte: it is no text, or one in UTF-16 without a mark (`iconv -f UTF-16 -t UTF-8` changes that)"


@dataclass(frozen=True)
class Piece:
    """A file, or the part [start, stop) of it: bytes of plain text and JSON lines, row groups of Parquet; stop -1:
    the end."""

    path: str
    size: int
    start: int = 0
    stop: int = -1
    name: str = ""
    """What reports and skip lists call it, if not by its path."""
    source: str = ""
    """What the report counts it under."""
    stamp: str = ""
    """Changes when the file does."""
    base: int = 0
    """Where the file begins in what it was unpacked from."""
    block: int = 0
    """Of a compressed file that is dealt out (megalm/corpus/blocks.py): bytes of a block; 0: it is read as it is."""
    plain: bool = False
    """The file is known to hold its documents as they are: nothing needs to be unpacked or looked for in its first bytes."""
    broken: tuple[str, str] = ("", "")
    """Place of, and reason for, what could not be unpacked behind this piece; its path is empty."""

    @property
    def label(self) -> str:
        """What reports and errors call it."""
        return self.name or self.path


@dataclass(frozen=True)
class Document:
    """A text with its place: byte offset (text, JSON lines) or row (Parquet, Arrow, CSV, JSON)."""

    text: str
    place: str
    fields: dict[str, Any]
    lost: str = ""
    """Which of the fields that nobody needs could not be read, and why; they are not among the fields."""

    def field(self, name: str) -> Any:
        """The value of a key or column, or of a path such as meta.language; None where there is none."""
        return look_up_value(self.fields, name)


@dataclass(frozen=True)
class BadDocument:
    """What could not be read, where, and why."""

    place: str
    reason: str


def find_files(
    inputs: Sequence[str], say: Callable[[str], None] = lambda message: None, results: Sequence[str] = ()
) -> list[Piece]:
    """Find every data file behind files, folders, globs and URLs, whole; sorted inside each input, each once. `say` is told
    what folders and globs hold besides. `results`: files and folders that the command writes, which are no input.

    Errors: ConfigError for an input that names nothing, or cannot be listed.
    """
    found: dict[str, Piece] = {}
    for item in inputs:
        left_out = LeftOut()
        matches = list_files(item, left_out, results)
        if not matches:
            only = f" but what is left out: {left_out}" if left_out.paths else ""
            raise ConfigError(
                f"input {item!r} names no file{only}. Give files, folders, globs or URLs of {', '.join(ENDINGS)} "
                f"(also with {', '.join(COMPRESSIONS)}); a file with another ending is read as text when it is "
                f"named itself."
            )
        if left_out.paths:
            say(f"{item}: left out: {left_out}")
        for match in matches:
            once = match.path if "://" in match.path else os.path.realpath(match.path)
            found.setdefault(once, Piece(match.path, match.size, source=item, stamp=match.stamp))
    return list(found.values())


def choose_piece_bytes(files: Sequence[Piece]) -> int:
    """Choose how much of this input one process takes at a time."""
    return min(max(sum(file.size for file in files) // PIECES, SMALLEST_PIECE), LARGEST_PIECE)


def cut_into_pieces(files: Sequence[Piece]) -> list[Piece]:
    """One piece for each file, several for large plain text, JSON lines and Parquet; depends on names and sizes
    only. A compressed one with a large share of the input is marked to be dealt out in blocks."""
    pieces = []
    each = choose_piece_bytes(files)
    share = max(sum(file.size for file in files) // DEALT, SMALLEST_PIECE)
    parquet = [f.path for f in files if find_ending(f.path) == ".parquet" and not name_compression(f.path)]
    row_groups = tables.count_row_groups(parquet) if parquet else {}
    for file in files:
        ending = find_ending(file.path)
        lines = ending in LINE_ENDINGS
        if groups := row_groups.get(file.path, 0):
            pieces += [replace(file, size=file.size // groups, start=g, stop=g + 1) for g in range(groups)]
        elif (
            ending in WHOLE_ENDINGS
            or file.size <= (each if lines else LONGEST_TEXT)
            and not name_compression(file.path)
        ):
            pieces.append(file)
        elif file.plain or _is_plain(file):
            step = each if lines else TEXT_PIECE
            for start in range(0, file.size, step):
                stop = min(start + step, file.size)
                pieces.append(replace(file, size=stop - start, start=start, stop=stop, plain=True))
        else:
            pieces.append(replace(file, block=each) if file.size > share else file)
    return pieces


def _is_plain(file: Piece) -> bool:
    with explain_failed_reads(file.label):
        return is_plain(file.path)


def read_piece(
    piece: Piece, field: str = "text", others: Sequence[str] | None = None
) -> Iterator[Document | BadDocument]:
    """Read the documents of a piece, in order.

    field: a key or column, a path into one, or a template (see fields.py). others: what else of the fields will be asked
    for, so that the remaining columns of a table need not be read; None: everything.
    Errors: ConfigError if the file is not there or cannot be read. A broken line is a BadDocument, and so is all that
    follows where the file is damaged or cut off.
    """
    with explain_failed_reads(piece.label):
        if piece.broken[0]:
            yield BadDocument(*piece.broken)
            return
        try:
            yield from _documents(piece, field, others)
        except Unreadable as error:
            yield describe_damage(error)


def describe_damage(error: Unreadable) -> BadDocument:
    """Describe what is missing of a file."""
    return BadDocument(f"byte {error.at}", error.reason)


def _documents(piece: Piece, field: str, others: Sequence[str] | None) -> Iterator[Document | BadDocument]:
    ending = find_ending(piece.path)
    if ending in LINE_ENDINGS:
        yield from _json_lines(piece, field)
    elif ending == ".json":
        yield from _json(piece, field)
    elif ending in (".csv", ".tsv"):
        yield from _csv(piece, field, "," if ending == ".csv" else "\t")
    elif ending in WEB_ENDINGS:
        yield from _web(piece, field)
    elif ending in TABLE_ENDINGS:
        yield from _table(piece, field, others, ending)
    else:
        yield from _text(piece)


@contextlib.contextmanager
def explain_failed_reads(path: str) -> Iterator[None]:
    """What a damaged file, or a store, raises inside becomes a ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if "://" not in path and not isinstance(error, OSError):
            raise  # only the clients of stores raise kinds of their own
        raise ConfigError(f"{path}: cannot be read ({error}). Restore the file, or leave it out.") from error


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins inside the piece; the offset is that in what was unpacked."""
    with open_bytes(piece.path, piece.plain) as file:
        offset = 0
        if piece.start:
            file.seek(piece.start - 1)
            offset = piece.start - 1 + len(file.readline())  # the line before belongs to the piece before
        while piece.stop < 0 or offset < piece.stop:
            line = file.readline()
            if not line:
                return
            yield piece.base + offset, line
            offset += len(line)


def _decode(data: bytes, place: int) -> str | BadDocument:
    mark = len(BOM) if place == 0 and data.startswith(BOM) else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        advice = "if it is text in another encoding, change that by `iconv -f ENCODING -t UTF-8`"
        return BadDocument(f"byte {place + mark + error.start}", f"invalid UTF-8 ({error.reason}); {advice}")


def _text(piece: Piece) -> Iterator[Document | BadDocument]:
    with open_bytes(piece.path, piece.plain) as file:
        if not file.seekable():
            for start, data in cut_text(file):
                yield _text_document(data, start)
            return
        start, stop = _edge(file, piece.start), _edge(file, piece.stop) if piece.stop >= 0 else -1
        file.seek(start)
        data = file.read(stop - start if stop >= 0 else -1)
    if data or start == 0:  # else a line goes on through the whole piece
        yield _text_document(data, piece.base + start)


def _text_document(data: bytes, start: int) -> Document | BadDocument:
    text = _decode(data, start)
    if isinstance(text, str) and "\0" in text:
        place = start + len(text[: text.index("\0")].encode())
        return BadDocument(f"byte {place}", f"{NO_TEXT}; the text around it is left out")
    return text if isinstance(text, BadDocument) else Document(text, f"byte {start}", {})


def _edge(file: BinaryIO, at: int) -> int:
    """Where a text is cut near a byte: behind the next line end, or between two characters where there is none."""
    if at == 0:
        return 0
    file.seek(at - 1)
    return at - 1 + _cut(file.read(LONGEST_LINE))


def _cut(ahead: bytes) -> int:
    """The same, in the bytes from the one before the place on."""
    found = ahead.find(b"\n") + 1
    if found or len(ahead) < LONGEST_LINE:
        return found or len(ahead)
    cut = 1
    while cut < 5 and ahead[cut] & 0xC0 == 0x80:  # inside a character
        cut += 1
    return cut


def cut_text(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, bytes) of the parts of a text of unknown length: whole, or cut where a file of that length would
    be."""
    data, start, next_cut, more = bytearray(), 0, TEXT_PIECE, True
    while more:
        block = read_some(file, 1 << 20)
        data += block
        more = bool(block)
        if start + len(data) <= LONGEST_TEXT:
            continue
        while start + len(data) >= next_cut + LONGEST_LINE or (not more and start + len(data) > next_cut):
            at = next_cut - 1 - start
            if at >= 0:  # else a line went on beyond this place
                end = at + _cut(bytes(data[at : at + LONGEST_LINE]))
                yield start, bytes(data[:end])
                del data[:end]
                start += end
            next_cut += TEXT_PIECE
    if data or start == 0:
        yield start, bytes(data)


def _json_lines(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    for offset, line in _lines(piece):
        if line and not line.isspace():
            yield read_json_line(line, offset, field)


def read_json_line(line: bytes, offset: int, field: str) -> Document | BadDocument:
    """Read the document of a line that is not empty and begins at this byte of its file."""
    text = _decode(line, offset)
    if isinstance(text, BadDocument):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        line_ends = "; its lines end in CR alone: change that by `tr '\\r' '\\n'`" if "\r" in text.strip() else ""
        return BadDocument(f"byte {offset}", f"not JSON ({error}){line_ends}")
    return _from_record(record, field, f"byte {offset}")


def _from_record(record: Any, field: str, place: str) -> Document | BadDocument:
    if isinstance(record, str):
        text, wrong, fields = record, explain_no_text(record), {}
    elif isinstance(record, dict):
        (text, wrong), fields = take_text(record, field), record
    else:
        return BadDocument(place, f"is {type(record).__name__}, not an object or a string")
    return BadDocument(place, wrong) if wrong else Document(text, place, fields)


def _json(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    with open_bytes(piece.path, piece.plain) as file:
        number = -1
        try:
            for number, record in enumerate(_json_values(_reader_of_characters(file))):
                yield _from_record(record, field, f"item {number}")
        except (ValueError, RecursionError) as error:
            yield BadDocument(f"item {number + 1}", f"not JSON ({error}); the rest of the file is left out")


def _reader_of_characters(file: BinaryIO) -> Callable[[int], str]:
    """A function that gives the characters of about so many more bytes; none at the end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def read(size: int) -> str:
        while True:
            data = read_some(file, size)
            text = decoder.decode(data, not data)
            if text or not data:
                return text

    return read


def _json_values(read: Callable[[int], str]) -> Iterator[Any]:
    """The values of a file one after another, and those in an array one by one; no more than one is held.

    Errors: ValueError where the text is not JSON.
    """
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*").match
    buffer, at, inside, ended, least = "", 0, False, False, BLOCK
    expected = ""  # what must come before the next value of an array
    while True:
        if not ended and len(buffer) - at < least:
            block = read(max(BLOCK, least))
            ended = not block
            buffer, at = buffer[at:] + block, 0
            continue
        at = skip(buffer, at).end()  # type: ignore[union-attr]
        here = buffer[at : at + 1]
        if not here:
            if not ended:
                continue
            if inside:
                raise ValueError("the array does not end")
            return
        if not inside and here == "[":
            inside, expected, at = True, "", at + 1
        elif inside and here == "]":
            inside, at = False, at + 1
        elif inside and expected:
            if here != expected:
                raise ValueError(f"{here!r} where a comma should be")
            expected, at = "", at + 1
        else:
            try:
                value, end = decode(buffer, at)
            except json.JSONDecodeError as error:
                whole = ended or (not error.msg.startswith("Unterminated") and error.pos < len(buffer) - 16)
                if whole or least > LONGEST_VALUE:
                    raise
                least *= 2  # the value goes on
                continue
            if end == len(buffer) and not ended:  # of a number there may be more
                least *= 2
                continue
            yield value
            at, least, expected = end, BLOCK, "," if inside else ""


def _web(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    with open_bytes(piece.path, piece.plain) as file:
        for page in web.read_pages(file):
            place = f"item {page.number}"
            yield BadDocument(place, page.wrong) if page.wrong else _from_record(page.fields, field, place)


def _csv(piece: Piece, field: str, delimiter: str) -> Iterator[Document | BadDocument]:
    csv.field_size_limit(LONGEST_VALUE)
    with open_bytes(piece.path, piece.plain) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, strict=True, delimiter=delimiter)
        try:
            header = next((row for row in rows if any(value.strip() for value in row)), [])
            twice = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
            if twice:
                what = f"the column {twice[0]!r} is there twice: rename one; the file is left out"
                yield BadDocument(f"line {rows.line_num}", what)
                return
            for row in rows:
                if row:
                    yield _from_row(header, row, field, f"line {rows.line_num}")
        except csv.Error as error:
            yield BadDocument(f"line {rows.line_num + 1}", f"not CSV ({error}); the rest of the file is left out")


def _from_row(header: list[str], row: list[str], field: str, place: str) -> Document | BadDocument:
    if len(row) > len(header):
        return BadDocument(place, f"has {len(row)} values for {len(header)} columns: a value may lack its quotes")
    if any("\0" in value for value in row):
        return BadDocument(place, NO_TEXT)
    return _from_record({**dict.fromkeys(header), **dict(zip(header, row, strict=False))}, field, place)


def _table(piece: Piece, field: str, others: Sequence[str] | None, ending: str) -> Iterator[Document | BadDocument]:
    stop = None if piece.stop < 0 else piece.stop
    names = list_names(field)
    if field not in names:  # a column may be called what looks like a template
        names, others = ([*names, field], None) if others is None else (names, [*others, field])
    for row in tables.read_records(piece.path, ending, piece.start, stop, names, others):
        place = f"row {row.number}"
        found = BadDocument(place, row.wrong) if row.wrong else _from_record(row.record, field, place)
        yield replace(found, lost=row.lost) if row.lost and isinstance(found, Document) else found
