"""How shards of MDS are stored: the checksums and compressions that mosaicml-streaming knows."""

from __future__ import annotations

import bz2
import hashlib
import zlib
from collections.abc import Callable
from functools import partial

import xxhash

from megalm.config.errors import ConfigError

_FROM_HASHLIB = (
    "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3_224", "sha3_256", "sha3_384", "sha3_512", "blake2b",
    "blake2s",
)  # fmt: skip
_FROM_XXHASH = ("xxh32", "xxh64", "xxh128", "xxh3_64", "xxh3_128")
HASHES: dict[str, Callable[[bytes], str]] = {}
"""Name -> checksum of some bytes, in hexadecimal digits."""


def _digest(new: Callable, data: bytes) -> str:
    return new(data).hexdigest()


HASHES |= {name: partial(_digest, partial(hashlib.new, name, usedforsecurity=False)) for name in _FROM_HASHLIB}
HASHES |= {name: partial(_digest, getattr(xxhash, name)) for name in _FROM_XXHASH}
COMPRESSIONS = ("zstd", "gz", "bz2", "br", "snappy")


def parse_compression(name: str | None) -> tuple[str, int | None] | None:
    """`zstd:7` -> (zstd, 7), `gz` -> (gz, None). Errors: ValueError for one that is not known"""
    if name is None:
        return None
    kind, _, level = str(name).partition(":")
    if kind not in COMPRESSIONS or not (level.isdigit() or name == kind):
        raise ValueError(f"compression {name!r} is not read: only {', '.join(COMPRESSIONS)}")
    return kind, int(level) if level else None


def compress(name: str, data: bytes) -> bytes:
    """Errors: ValueError for one that is not written"""
    kind, level = parse_compression(name) or ("", None)
    if kind != "zstd":
        raise ValueError(f"compression {name!r} is not written: only zstd")
    import zstandard

    return zstandard.ZstdCompressor(level=3 if level is None else level).compress(data)


def decompress(name: str, data: bytes, size: int) -> bytes:
    """`size` bytes, never more. Errors: ValueError for data that are damaged or of another size; ConfigError where a
    library is missing."""
    kind = (parse_compression(name) or ("",))[0]
    try:
        raw = _DECOMPRESS[kind](data, size)
    except ConfigError:
        raise
    except Exception as error:  # each library has its own
        raise ValueError(str(error) or type(error).__name__) from error
    if len(raw) != size:
        raise ValueError(f"it does not hold {size} bytes")
    return raw


def _zstd(data: bytes, size: int) -> bytes:
    import zstandard

    if zstandard.frame_content_size(data) not in (size, -1):
        raise ValueError(f"it says that it holds another number of bytes than {size}")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)


def _gz(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj(31)
    raw = stream.decompress(data, size + 1)
    if len(raw) <= size and not stream.eof:
        raise ValueError("it ends too early")
    return raw


def _bz2(data: bytes, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _br(data: bytes, size: int) -> bytes:
    try:
        import brotli
    except ImportError:
        raise ConfigError("shards compressed by brotli need it: `pip install brotli`.") from None
    return brotli.Decompressor().process(data, output_buffer_limit=size + 1)


def _snappy(data: bytes, size: int) -> bytes:
    try:
        import snappy
    except ImportError:
        raise ConfigError("shards compressed by snappy need it: `pip install python-snappy`.") from None
    length = shift = 0
    for byte in data[:10]:  # a number in groups of seven bits stands at the beginning
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if length != size:
        raise ValueError(f"it says that it holds another number of bytes than {size}")
    return snappy.uncompress(data)


_DECOMPRESS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": _zstd, "gz": _gz, "bz2": _bz2, "br": _br, "snappy": _snappy
}  # fmt: skip
