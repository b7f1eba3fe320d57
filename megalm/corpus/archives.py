"""The bytes of compressed files, and where such a file is damaged or cut off."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
MAGICS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
INPUT = 1 << 14  # bytes unpacked at a time: of nothing but zeros they become half a gigabyte at most
BUFFER = 1 << 20


class DamagedArchive(EOFError):
    """A compressed file that cannot be unpacked from here on.

    `at`: bytes that it gave before. They are right if it was only `cut` off; a damaged stream may have given wrong ones
    before it was noticed, by a code that means nothing or by the checksum at its end.
    """

    def __init__(self, at: int, reason: str, cut: bool):
        super().__init__(reason)
        self.at, self.cut = at, cut


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


_NEW: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "zstd": _zstd,
}
_PADDED = ("gzip", "xz")  # their streams may be followed by zeros


def damage() -> tuple[type[Exception], ...]:
    """What the libraries raise for content that is no archive, or a broken one."""
    import zstandard

    return EOFError, ValueError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError


class Unpacked(io.RawIOBase):
    """The content of a compressed file: its streams (members, frames) one after another.

    Errors: DamagedArchive, after everything before it was read, and at every later read; what the source raises comes
    through as it is.
    """

    def __init__(self, source: BinaryIO, kind: str):
        self._source, self._kind = source, kind
        self._stream: Any = None
        self._input = b""
        self._output = memoryview(b"")
        self._damage: DamagedArchive | None = None
        self.consumed = 0
        """Bytes of the compressed file that were read."""
        self.unpacked = 0
        """Bytes that they gave."""

    def readable(self) -> bool:
        return True

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
            except damage() as error:
                self._damage = DamagedArchive(self.unpacked, str(error), cut=not self._input)
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
            self._stream = _NEW[self._kind]()
        self._output = memoryview(self._stream.decompress(self._input))
        self._input = b""
        self.unpacked += len(self._output)
        if self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None


def unpacked(source: BinaryIO, kind: str) -> io.BufferedReader:
    """The content of a compressed file."""
    return io.BufferedReader(Unpacked(source, kind), BUFFER)


def read_some(file: BinaryIO, size: int) -> bytes:
    """So many bytes; fewer at the end, or where an archive is damaged: then the next call raises DamagedArchive.

    A buffered reader's own `read` would lose what it had read before the error.
    """
    if not isinstance(getattr(file, "raw", None), Unpacked):
        return file.read(size)
    parts: list[bytes] = []
    while size > 0:
        try:
            part = file.read1(size)  # type: ignore[attr-defined]
        except DamagedArchive:
            if parts:
                break
            raise
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
