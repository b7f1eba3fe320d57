"""Reading documents out of files: text, JSON lines, JSON, CSV, Parquet, Arrow; compressed or not; local or by URL.

A piece is a file, or a range of bytes or row groups of one; `read_piece` is a pure function of it, so any process can
do any piece.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, BinaryIO

from megalm.config.errors import ConfigError

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
SMALLEST_PIECE, LARGEST_PIECE = 4 << 20, 64 << 20  # bytes of one file that are read at a time by one process
PIECES = 256  # that a large input is cut into at least: enough for all processes to end together
LONGEST_TEXT = 64 << 20  # a text file above this is cut at line ends into documents of TEXT_PIECE
TEXT_PIECE = 16 << 20


@dataclass(frozen=True)
class Piece:
    """A file, or the part [start, stop) of it: bytes of plain text and JSON lines, row groups of Parquet; stop -1:
    the end."""

    path: str
    size: int
    start: int = 0
    stop: int = -1
    name: str = ""
    """What reports and skip lists call it; empty: the path."""
    source: str = ""
    """What the report counts it under."""


@dataclass(frozen=True)
class Document:
    """A text with its place: byte offset (text, JSON lines) or row (Parquet, Arrow, CSV, JSON)."""

    text: str
    place: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadDocument:
    """What could not be read, where, and why."""

    place: str
    reason: str


def find_files(inputs: Sequence[str]) -> list[Piece]:
    """Every data file behind files, folders, globs and URLs, whole; sorted inside each input, each once.

    Errors: ConfigError for an input that names nothing.
    """
    found: dict[str, Piece] = {}
    for item in inputs:
        matches = _find_remote(item) if "://" in item else _find_local(item)
        if not matches:
            raise ConfigError(
                f"input {item!r} names no file. Give files, folders, globs or URLs of {', '.join(ENDINGS)} "
                f"(also with {', '.join(COMPRESSIONS)}); a file with another ending is read as text when it is "
                f"named itself."
            )
        for path, size in matches:
            found.setdefault(path, Piece(path, size, source=item))
    return list(found.values())


def _find_local(item: str) -> list[tuple[str, int]]:
    if os.path.isdir(item):
        paths = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(item)
            for name in names
            if _ending(name) in ENDINGS
        ]
    elif os.path.exists(item):
        paths = [item]
    else:
        paths = [path for path in glob.glob(item, recursive=True) if os.path.isfile(path)]
    return [(path, os.path.getsize(path)) for path in sorted(paths)]


def _find_remote(item: str) -> list[tuple[str, int]]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(item)
        if any(character in path for character in "*?["):
            details = system.glob(path, detail=True)
        elif system.isdir(path):
            details = {k: v for k, v in system.find(path, detail=True).items() if _ending(k) in ENDINGS}
        else:
            details = {path: system.info(path)}
        return [
            (system.unstrip_protocol(k), int(v["size"] or 0)) for k, v in sorted(details.items()) if v["type"] == "file"
        ]
    except Exception as error:  # each store's library raises its own kinds
        raise ConfigError(
            f"input {item!r} cannot be listed: {error}. Check the address and the credentials; s3:// needs `pip "
            f"install s3fs`."
        ) from error


def _ending(path: str) -> str:
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSIONS else ending


def _compression(path: str) -> str | None:
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


def piece_bytes(files: Sequence[Piece]) -> int:
    """How much of this input one process takes at a time."""
    return min(max(sum(file.size for file in files) // PIECES, SMALLEST_PIECE), LARGEST_PIECE)


def cut_into_pieces(files: Sequence[Piece]) -> list[Piece]:
    """One piece for each file, several for large plain text, JSON lines and Parquet; depends on names and sizes
    only."""
    pieces = []
    each = piece_bytes(files)
    for file in files:
        ending = _ending(file.path)
        lines = ending in (".jsonl", ".ndjson")
        if ending == ".parquet":
            groups = _row_groups(file.path)
            pieces += [replace(file, size=file.size // groups, start=g, stop=g + 1) for g in range(groups)]
        elif _compression(file.path) or ending in (".json", ".csv", ".arrow"):
            pieces.append(file)
        elif file.size > (each if lines else LONGEST_TEXT):
            step = each if lines else TEXT_PIECE
            for start in range(0, file.size, step):
                stop = min(start + step, file.size)
                pieces.append(replace(file, size=stop - start, start=start, stop=stop))
        else:
            pieces.append(file)
    return pieces


def read_piece(piece: Piece, field: str = "text") -> Iterator[Document | BadDocument]:
    """The documents of a piece, in order. `field` is a column or key, or a template such as "{title}\\n\\n{body}".

    Errors: ConfigError if the file as a whole cannot be read. A broken line is a BadDocument.
    """
    ending = _ending(piece.path)
    try:
        if ending in (".jsonl", ".ndjson"):
            yield from _json_lines(piece, field)
        elif ending == ".json":
            yield from _json(piece, field)
        elif ending == ".csv":
            yield from _csv(piece, field)
        elif ending in (".parquet", ".arrow"):
            yield from _table(piece, field, ending)
        else:
            yield from _text(piece)
    except (OSError, EOFError, lzma.LZMAError, _zstd_error()) as error:
        raise ConfigError(
            f"{piece.path}: cannot be read to its end ({error}). Restore the file, or leave it out."
        ) from error


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The decompressed bytes of a local file or URL."""
    with contextlib.ExitStack() as stack:
        if "://" in path:
            import fsspec

            raw = stack.enter_context(fsspec.open(path, "rb").open())
        else:
            raw = stack.enter_context(open(path, "rb", buffering=1 << 20))
        kind = _compression(path)
        if kind == "gzip":
            raw = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif kind == "bz2":
            raw = stack.enter_context(bz2.BZ2File(raw))
        elif kind == "xz":
            raw = stack.enter_context(lzma.LZMAFile(raw))
        elif kind == "zstd":
            raw = stack.enter_context(io.BufferedReader(_ZstandardReader(raw), 1 << 20))
        yield raw


class _ZstandardReader(io.RawIOBase):
    """Frames one after another; unlike the library's own reader it notices a last frame that is cut off."""

    def __init__(self, source: BinaryIO):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._source = source
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._source.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed file ends inside a frame")
                return 0
            self._frame = self._frame or self._new()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins inside the piece."""
    with open_bytes(piece.path) as file:
        offset = 0
        if piece.start:
            file.seek(piece.start - 1)
            offset = piece.start - 1 + len(file.readline())  # the line before belongs to the piece before
        while piece.stop < 0 or offset < piece.stop:
            line = file.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)


def _decode(data: bytes, place: int) -> str | BadDocument:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadDocument(f"byte {place + error.start}", f"invalid UTF-8 ({error.reason})")


def _text(piece: Piece) -> Iterator[Document | BadDocument]:
    start = piece.start
    if piece.stop < 0 and _compression(piece.path) is None:
        with open_bytes(piece.path) as file:
            parts = [file.read()]
    elif piece.stop < 0:
        yield from _long_text(piece)
        return
    else:
        lines = list(_lines(piece))
        start, parts = (lines[0][0] if lines else start), [line for _, line in lines]
    text = _decode(b"".join(parts), start)
    yield text if isinstance(text, BadDocument) else Document(text, f"byte {start}", {})


def _long_text(piece: Piece) -> Iterator[Document | BadDocument]:
    """A compressed text of unknown length: whole, or cut at line ends as a plain one would be."""
    buffer: list[bytes] = []
    held = start = 0
    for _, line in _lines(piece):
        buffer.append(line)
        held += len(line)
        if held >= LONGEST_TEXT:
            text = _decode(b"".join(buffer), start)
            yield text if isinstance(text, BadDocument) else Document(text, f"byte {start}", {})
            start, held, buffer = start + held, 0, []
    if held or start == 0:
        text = _decode(b"".join(buffer), start)
        yield text if isinstance(text, BadDocument) else Document(text, f"byte {start}", {})


def _json_lines(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    for offset, line in _lines(piece):
        if not line.strip():
            continue
        text = _decode(line, offset)
        if isinstance(text, BadDocument):
            yield text
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield BadDocument(f"byte {offset}", f"not JSON ({error})")
            continue
        yield _from_record(record, field, f"byte {offset}")


@lru_cache(maxsize=16)
def _names(field: str) -> list[str]:
    return re.findall(r"{(\w+)}", field) or [field]


def _from_record(record: Any, field: str, place: str) -> Document | BadDocument:
    if isinstance(record, str):
        return Document(record, place, {})
    if not isinstance(record, dict):
        return BadDocument(place, f"is {type(record).__name__}, not an object or a string")
    names = _names(field)
    values = []
    for name in names:
        value = record.get(name)
        if not isinstance(value, str):
            keys = ", ".join(map(str, list(record)[:8]))
            return BadDocument(place, f"field {name!r} is {type(value).__name__}, not text; there are: {keys}")
        values.append(value)
    text = values[0]
    if "{" in field:
        text = re.sub(r"{(\w+)}", lambda match: record[match.group(1)], field)
    if _surrogate(text):
        return BadDocument(place, "holds half of a surrogate pair, which is not text")
    return Document(text, place, record)


def _surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _json(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    with open_bytes(piece.path) as file:
        data = file.read()
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{piece.path}: not one JSON value ({error}). A file with one object a line must be called .jsonl."
        ) from error
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records):
        yield _from_record(record, field, f"item {number}")


def _csv(piece: Piece, field: str) -> Iterator[Document | BadDocument]:
    csv.field_size_limit(1 << 30)
    with open_bytes(piece.path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        try:
            for record in reader:
                yield _from_record(record, field, f"line {reader.line_num}")
        except (csv.Error, UnicodeDecodeError) as error:
            yield BadDocument(
                f"line {reader.line_num + 1}", f"not CSV in UTF-8 ({error}); the rest of the file is left out"
            )


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("reading .parquet and .arrow needs pyarrow: `pip install pyarrow`.") from error
    return pyarrow


def _row_groups(path: str) -> int:
    pyarrow = _pyarrow()
    try:
        with open_bytes(path) as file:
            return pyarrow.parquet.ParquetFile(file).num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{path}: not a readable Parquet file ({error}). Restore the file, or leave it out."
        ) from error


def _table(piece: Piece, field: str, ending: str) -> Iterator[Document | BadDocument]:
    pyarrow = _pyarrow()
    row = 0
    try:
        with open_bytes(piece.path) as file:
            if ending == ".parquet":
                table = pyarrow.parquet.ParquetFile(file)
                row = sum(table.metadata.row_group(g).num_rows for g in range(piece.start))
                batches = table.iter_batches(1024, row_groups=list(range(piece.start, piece.stop)))
            else:
                head = file.read(6)
                file.seek(0)
                if head == b"ARROW1":
                    reader = pyarrow.ipc.open_file(file)
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    batches = pyarrow.ipc.open_stream(file)
            for batch in batches:
                for record in batch.to_pylist():
                    yield _from_record(record, field, f"row {row}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{piece.path}: row {row}: {error}. Restore the file, or leave it out.") from error
