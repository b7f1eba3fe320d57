"""The bytes of compressed files, and where such a file is damaged or cut off."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma"}
LARGEST_WINDOW = 1 << 31  # bytes that zstd may hold to unpack a file: what `zstd --long=31` asks for, its own largest
ZSTD_HEADER = 18  # bytes of a frame in which it says what it needs
INPUT = 1 << 14  # bytes unpacked at a time: of nothing but zeros they become half a gigabyte at most
BUFFER = 1 << 20


class Unreadable(EOFError):
    """The content of a file, from here on. `at`: bytes that it gave before; `reason`: a sentence without its subject."""

    def __init__(self, at: int, reason: str):
        super().__init__(reason)
        self.at, self.reason = at, reason


class DamagedArchive(Unreadable):
    """A compressed file that cannot be unpacked from here on.

    What it gave before is right if it was only `cut` off; a damaged stream may have given something wrong before it was
    noticed, by a code that means nothing or by the checksum at its end.
    """

    def __init__(self, at: int, why: str, cut: bool):
        look = "look at what it gave before you use it"
        what = (
            "the compressed file is cut off"
            if cut
            else f"the compressed file is damaged here or before ({why}), {look}"
        )
        super().__init__(at, f"{what}; the rest of it is left out")
        self.cut = cut


class UnknownFrame(Unreadable):
    """A compressed file that is whole, and needs what is not there."""


class Stream(io.RawIOBase):
    """Content that is made while it is read, from the beginning to the end."""

    consumed = 0
    """Bytes of the file that were read."""

    def readable(self) -> bool:
        return True


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()


def _needs(head: bytes, error: Exception) -> str:
    """What a frame of zstd says that it needs, where we do not have it."""
    import zstandard

    if "too much memory" in str(error):
        return f"asks for more memory to be unpacked than the {LARGEST_WINDOW:,} bytes that are allowed"
    try:
        frame = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError:
        return ""
    if frame.dict_id:
        return (
            f"was compressed by zstd with the dictionary {frame.dict_id}, which is in another file: unpack it by `zstd -d -D "
            "DICTIONARY`"
        )
    return ""


_NEW: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
    "zstd": _zstd,
}
_PADDED = ("gzip", "xz")  # their streams may be followed by zeros


def list_damage_errors() -> tuple[type[Exception], ...]:
    """List what the libraries raise for content that is no archive, or a broken one."""
    import zstandard

    return EOFError, ValueError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError


class Unpacked(Stream):
    """The content of a compressed file: its streams (members, frames) one after another.

    Errors: Unreadable, after everything before it was read, and at every later read; what the source raises comes through
    as it is.
    """

    def __init__(self, source: BinaryIO, kind: str):
        self._source, self._kind = source, kind
        self._stream: Any = None
        self._input = b""
        self._output = memoryview(b"")
        self._damage: Unreadable | None = None
        self._head = b""  # of a frame
        self.unpacked = 0
        """Bytes that they gave."""

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._damage is not None:
                raise self._damage
            if not self._input:
                self._input = self._source.read(INPUT)
                self.consumed += len(self._input)
            if not self._input and self._stream is None:
                return 0
            try:
                self._unpack()
            except list_damage_errors() as error:
                needs = _needs(self._head, error) if self._kind == "zstd" and self._input else ""
                self._damage = (
                    UnknownFrame(self.unpacked, f"{needs}; the rest of it is left out")
                    if needs
                    else DamagedArchive(self.unpacked, str(error), cut=not self._input)
                )
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _unpack(self) -> None:
        if not self._input:
            raise EOFError("it ends in the middle")
        if self._stream is None:
            if self._kind in _PADDED:
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    return
            if self._kind == "zstd" and len(self._input) < ZSTD_HEADER:
                more = self._source.read(ZSTD_HEADER)
                self._input += more
                self.consumed += len(more)
            self._head = self._input[:ZSTD_HEADER]
            self._stream = _NEW[self._kind]()
        self._output = memoryview(self._stream.decompress(self._input))
        self._input = b""
        self.unpacked += len(self._output)
        if self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None


def unpack(source: BinaryIO, kind: str) -> io.BufferedReader:
    """The content of a compressed file."""
    return io.BufferedReader(Unpacked(source, kind), BUFFER)


def read_some(file: BinaryIO, size: int) -> bytes:
    """So many bytes; fewer at the end, or where a file cannot be read any further: then the next call raises Unreadable.

    A buffered reader's own `read` would lose what it had read before the error.
    """
    if not isinstance(getattr(file, "raw", None), Stream):
        return file.read(size)
    parts: list[bytes] = []
    while size > 0:
        try:
            part = file.read1(size)  # type: ignore[attr-defined]
        except Unreadable:
            if parts:
                break
            raise
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
