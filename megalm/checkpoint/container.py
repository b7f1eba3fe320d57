"""One tensor as the file that `torch.save` would write, split so that the values need not pass through a pickler.

torch's own reader (`torch.distributed.checkpoint.FileSystemReader`) calls `torch.load` on every stored chunk, so each
chunk is a torch.save archive: an uncompressed zip of a small pickle, then the raw values, then the directory.
`frame(...)` gives the bytes before and after the values; we read the values back directly, by their position.
The zip's CRC-32 of the values is left 0, as `torch.serialization.set_crc32_options(False)` does: torch does not look
at it, and our manifest has a better checksum.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from functools import lru_cache

import torch

ALIGNMENT = 64  # torch's own alignment of values inside an archive; also a cache line

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_LIMIT_32 = 0xFFFFFFFF

_STORAGE_NAMES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}


class _Storage:
    """Stands for the tensor's storage while its pickle is written."""


class _Tensor:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self):
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= max(size, 1)
        arguments = (_Storage(), 0, self.shape, tuple(reversed(strides)), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, storage: type, numel: int) -> None:
        super().__init__(file, protocol=2)
        self.storage, self.numel = storage, numel

    def persistent_id(self, obj: object):
        return ("storage", self.storage, "0", "cpu", self.numel) if isinstance(obj, _Storage) else None


@lru_cache(maxsize=4096)
def make_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Make the bytes of a torch.save archive before and after the values of a contiguous tensor.

    Returns: (head, tail); `head` is a multiple of 64 bytes, so values stay aligned where the archive starts aligned.
    """
    if dtype not in _STORAGE_NAMES:
        raise TypeError(f"a checkpoint holds {', '.join(str(d) for d in _STORAGE_NAMES)}; not {dtype}")
    numel = 1
    for size in shape:
        numel *= size
    described = io.BytesIO()
    _Pickler(described, getattr(torch, _STORAGE_NAMES[dtype]), numel).dump(_Tensor(shape))
    small = (("archive/data.pkl", described.getvalue()), ("archive/byteorder", b"little"), ("archive/version", b"3\n"))

    head, directory = bytearray(), bytearray()
    for name, content in small:
        crc = zlib.crc32(content)
        directory += _central(name, crc, len(content), len(head))
        head += _local(name, crc, len(content), b"") + content
    name, length, start = "archive/data/0", numel * dtype.itemsize, len(head)
    # Padding in front of the values goes into the local header's extra field (id "FB", as torch does it).
    sizes = b"" if length < _LIMIT_32 else struct.pack("<HHQQ", 1, 16, length, length)
    base = start + _LOCAL.size + len(name) + len(sizes) + 4
    pad = -base % ALIGNMENT
    head += _local(name, 0, length, sizes + struct.pack("<2sH", b"FB", pad) + b"Z" * pad)
    directory += _central(name, 0, length, start)

    at, entries = len(head) + length, len(small) + 1
    tail = bytes(directory)
    if at >= _LIMIT_32:
        tail += _END_64.pack(0x06064B50, 44, 45, 45, 0, 0, entries, entries, len(directory), at)
        tail += _LOCATOR_64.pack(0x07064B50, 0, at + len(directory), 1)
    tail += _END.pack(0x06054B50, 0, 0, entries, entries, len(directory), min(at, _LIMIT_32), 0)
    return bytes(head), tail


def _local(name: str, crc: int, length: int, extra: bytes) -> bytes:
    short = min(length, _LIMIT_32)
    version = 45 if length >= _LIMIT_32 else 0
    return (
        _LOCAL.pack(0x04034B50, version, 0, 0, 0, 0, crc, short, short, len(name), len(extra)) + name.encode() + extra
    )


def _central(name: str, crc: int, length: int, at: int) -> bytes:
    short = min(length, _LIMIT_32)
    extra = b"" if length < _LIMIT_32 else struct.pack("<HHQQ", 1, 16, length, length)
    version = 45 if extra else 0
    header = _CENTRAL.pack(
        0x02014B50, version, version, 0, 0, 0, 0, crc, short, short, len(name), len(extra), 0, 0, 0, 0, at
    )
    return header + name.encode() + extra
