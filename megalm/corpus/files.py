"""Input files of the data tools: what their names say, and reading their bytes decompressed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megalm.corpus.archives import COMPRESSIONS, Unreadable, unpack
from megalm.corpus.contents import HEAD, find_compression, is_like_text, open_as_documents

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
LINE_ENDINGS = (".jsonl", ".ndjson")
TABLE_ENDINGS = (".parquet", ".arrow", ".feather")
WEB_ENDINGS = (".warc", ".wet")
WHOLE_ENDINGS = (
    ".json",
    ".csv",
    ".tsv",
    *TABLE_ENDINGS,
    *WEB_ENDINGS,
)  # of formats that are read from their beginning only
ENDINGS = (*TEXT_ENDINGS, *LINE_ENDINGS, *WHOLE_ENDINGS)
BUFFER = 1 << 20
STREAM_HEAD = 1 << 16  # bytes by which a stream without a name is recognized


@dataclass(frozen=True)
class Found:
    """A file that an input names; `stamp` changes when its content does."""

    path: str
    size: int
    stamp: str


def find_ending(path: str) -> str:
    """Find the ending that tells the format, in small letters, without that of a compression."""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSIONS else ending


def name_compression(path: str) -> str | None:
    """How a file of this name is compressed."""
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


@contextlib.contextmanager
def open_bytes(path: str, plain: bool = False) -> Iterator[BinaryIO]:
    """Open the bytes of a local file or URL: decompressed, and in UTF-8 where a byte order mark says that it is UTF-16; it can be
    sought in if neither had to be done. Content that holds no documents raises Unreadable where it is read.

    plain: it is known to be none of this, and is opened as it is.
    """
    with contextlib.ExitStack() as stack:
        if "://" in path:
            import fsspec

            raw = stack.enter_context(fsspec.open(path, "rb").open())
            raw = raw if plain else io.BufferedReader(raw, BUFFER)
        else:
            raw = stack.enter_context(open(path, "rb", buffering=BUFFER))
        yield raw if plain else _content(raw, path)


def _content(raw: BinaryIO, path: str) -> BinaryIO:
    head = raw.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
    kind = find_compression(head)
    if kind is None and not is_like_text(head):
        kind = name_compression(path)  # it is damaged, or empty
    file: BinaryIO = raw
    if kind is not None:
        file = unpack(raw, kind)
        try:
            head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
        except Unreadable:
            return file  # which says so again
    if find_ending(path) in WEB_ENDINGS and head.startswith(b"WARC/"):
        return file
    return open_as_documents(file, head, find_ending(path) in TABLE_ENDINGS)


def is_plain(path: str) -> bool:
    """Whether the file is as its documents are, so that parts of it can be read alone.

    Errors: OSError, or what a store raises, for a file that cannot be read.
    """
    with open_bytes(path) as file:
        return file.seekable()


@contextlib.contextmanager
def open_seekable(path: str) -> Iterator[BinaryIO]:
    """`open_bytes` for formats that are read from their end: what is compressed is unpacked into a temporary file."""
    with open_bytes(path) as raw:
        if raw.seekable():
            yield raw
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(raw, whole, 1 << 20)
            whole.seek(0)
            yield whole


def is_stream(item: str) -> bool:
    """Whether this input can be read only once: standard input, a pipe, what a shell puts for `<(command)`."""
    if item == "-":
        return True
    try:
        mode = os.stat(item).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def spool(item: str, stem: str) -> Found:
    """Copies a stream to a file that begins with `stem`, named by what it holds: JSON lines or text, compressed or not.

    The stamp is a hash of the content, so that the same stream given again is known.
    """
    import sys

    digest, aside = hashlib.blake2b(digest_size=16), f"{stem}.partial"
    with contextlib.ExitStack() as stack:
        source = sys.stdin.buffer if item == "-" else stack.enter_context(open(item, "rb"))
        target = stack.enter_context(open(aside, "wb"))
        whole = stack.enter_context(contextlib.ExitStack())
        whole.callback(os.unlink, aside)
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
        size = target.tell()
        whole.pop_all()
    with open(aside, "rb") as file:
        kind = find_compression(file.read(HEAD))
    packed = next((ending for ending, name in COMPRESSIONS.items() if name == kind), "")
    if packed:
        os.replace(aside, f"{stem}{packed}")
        aside = f"{stem}{packed}"
    try:
        with open_bytes(aside) as file:
            head = file.read1(STREAM_HEAD)  # type: ignore[attr-defined]
    except Unreadable:
        head = b""  # reading the documents will say so
    path = f"{stem}{'.jsonl' if _is_json_lines(head) else '.txt'}{packed}"
    os.replace(aside, path)
    return Found(path, size, digest.hexdigest())


def _is_json_lines(head: bytes) -> bool:
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")[0]
    if len(line) >= STREAM_HEAD // 2:  # a long first line is not there whole
        return line.startswith((b'{"', b"{ "))
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
