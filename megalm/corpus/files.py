"""Input files of the data tools: finding them in folders, globs and stores, and reading their bytes decompressed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megalm.config.errors import ConfigError
from megalm.corpus.archives import COMPRESSIONS, MAGICS, damage, unpacked

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
HEAD = 1 << 16  # bytes by which a stream without a name is recognized


@dataclass(frozen=True)
class Found:
    """A file that an input names; `stamp` changes when its content does."""

    path: str
    size: int
    stamp: str


def list_files(item: str, ignored: list[str] | None = None) -> list[Found]:
    """The files behind a path, folder, glob or URL, sorted; empty where there are none.

    `ignored` receives what a folder holds besides, whose endings are of no format that is read.
    """
    return _list_remote(item, ignored) if "://" in item else _list_local(item, ignored)


def _known(paths: Iterable[str], ignored: list[str] | None) -> list[str]:
    found = []
    for path in paths:
        if ending_of(path) in ENDINGS:
            found.append(path)
        elif ignored is not None and not os.path.basename(path).startswith("."):
            ignored.append(path)
    return found


def _walk(folder: str) -> Iterator[str]:
    """All files below, also through links to folders; a folder that is linked to twice comes once."""
    seen = set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(inside)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort(
            key=lambda name: (os.path.islink(os.path.join(inside, name)), name)
        )  # the folder before links to it
        yield from (os.path.join(inside, name) for name in names)


def _list_local(item: str, ignored: list[str] | None) -> list[Found]:
    if os.path.isdir(item):
        paths = _known(_walk(item), ignored)
    elif os.path.exists(item):
        paths = [item]
    else:
        paths = [path for path in glob.glob(item, recursive=True) if os.path.isfile(path)]
    found = []
    for path in sorted(paths):
        try:
            status = os.stat(path)
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror} (a link that points nowhere?). Mend it or remove it."
            ) from error
        found.append(Found(path, status.st_size, str(status.st_mtime_ns)))
    return found


def _list_remote(item: str, ignored: list[str] | None) -> list[Found]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(item)
        if any(character in path for character in "*?["):
            details = system.glob(path, detail=True)
        elif system.isdir(path):
            below = system.find(path, detail=True)
            details = {name: below[name] for name in _known(below, ignored)}
        else:
            details = {path: system.info(path)}
        return [
            Found(system.unstrip_protocol(k), int(v["size"] or 0), _stamp(v))
            for k, v in sorted(details.items())
            if v["type"] == "file"
        ]
    except Exception as error:  # each store's library raises its own kinds
        raise ConfigError(
            f"input {item!r} cannot be listed: {error}. Check the address and the credentials; s3:// needs `pip "
            f"install s3fs`."
        ) from error


def _stamp(details: dict[str, Any]) -> str:
    return "".join(
        str(details[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if details.get(key)
    )


def ending_of(path: str) -> str:
    """The ending that tells the format, in small letters, without that of a compression."""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSIONS else ending


def compression_of(path: str) -> str | None:
    """How a file of this name is compressed."""
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The decompressed bytes of a local file or URL."""
    with contextlib.ExitStack() as stack:
        if "://" in path:
            import fsspec

            raw = stack.enter_context(fsspec.open(path, "rb").open())
        else:
            raw = stack.enter_context(open(path, "rb", buffering=1 << 20))
        kind = compression_of(path)
        yield raw if kind is None else stack.enter_context(unpacked(raw, kind))


@contextlib.contextmanager
def open_seekable(path: str) -> Iterator[BinaryIO]:
    """`open_bytes` for formats that are read from their end: what is compressed is unpacked into a temporary file."""
    with open_bytes(path) as raw:
        if compression_of(path) is None:
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
        start = file.read(8)
    packed = next((ending for magic, ending in MAGICS.items() if start.startswith(magic)), "")
    if packed:
        os.replace(aside, f"{stem}{packed}")
        aside = f"{stem}{packed}"
    try:
        with open_bytes(aside) as file:
            head = file.read(HEAD)
    except damage():
        head = b""  # reading the documents will say so
    path = f"{stem}{'.jsonl' if _is_json_lines(head) else '.txt'}{packed}"
    os.replace(aside, path)
    return Found(path, size, digest.hexdigest())


def _is_json_lines(head: bytes) -> bool:
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")[0]
    if len(line) >= HEAD // 2:  # a long first line is not there whole
        return line.startswith((b'{"', b"{ "))
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
