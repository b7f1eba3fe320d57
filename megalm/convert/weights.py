"""Where weights come from and go to: one small interface, and the folders of safetensors files that implement it.

Tensors pass one by one, so memory stays near the largest tensor, whatever the model's size. Nothing is ever unpickled
except by PyTorch's restricted loader (`weights_only=True`), which builds tensors and refuses everything else.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.convert import restricted
from megalm.tokenizer.damage import describe_damage

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class WeightReader(Protocol):
    """A set of named tensors that are read one at a time."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


class WeightWriter(Protocol):
    """Takes named tensors one at a time; nothing is there for others to read before `close`."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def close(self) -> None: ...


class MemoryWeights:
    """Reader and writer over a dict of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        self.tensors = dict(tensors or {})

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach()

    def write(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.clone()

    def close(self) -> None:
        pass


class SafetensorsReader:
    """The tensors of some safetensors files."""

    def __init__(self, files: Iterable[Path]):
        self._entries: dict[str, tuple[Path, dict[str, Any], int]] = {}
        for file in files:
            header, start = _read_header(file)
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if name in self._entries:
                    raise ConfigError(
                        f"{file}: tensor {name} is also in {self._entries[name][0]}; remove one of the files"
                    )
                self._entries[name] = (file, entry, start)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name][1]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entries[name][1]["dtype"]]

    def read(self, name: str) -> Tensor:
        file, entry, start = self._entries[name]
        shape, dtype = self.shape(name), self.dtype(name)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        first, last = entry["data_offsets"]
        data = bytearray(last - first)
        with open(file, "rb") as stream:
            stream.seek(start + first)
            if stream.readinto(data) != len(data):
                raise ConfigError(f"{file}: ends before tensor {name} does; the file is truncated, copy it again")
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read a safetensors file's header, checked against the file's length, and where its data begin."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(512)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        # A header begins with { and ends before the file does; what is none of these is something else by nature.
        if length > min(size - 8, 100_000_000) or start[8:9] != b"{":
            what = describe_damage(start)
            if what is None and start[8:9] == b"{":
                what = f"cut short: it holds {size:,} bytes, its header alone has {length:,}; copy it again"
            raise ConfigError(f"{file}: {what or 'not a safetensors file; is it another file under this name?'}")
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ConfigError(f"{file}: damaged, its header is not JSON ({error}); copy it again") from None
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name, (first, last), shape = entry["dtype"], entry["data_offsets"], tuple(entry["shape"])
            wanted, there = math.prod(shape), last - first
        except (TypeError, KeyError, ValueError):
            raise ConfigError(f"{file}: damaged, its header does not say where {name} lies; copy it again") from None
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            raise ConfigError(f"{file}: tensor {name} has dtype {dtype_name}; known are {', '.join(DTYPES)}")
        end = max(end, last)
        if there != wanted * dtype.itemsize or first < 0:
            raise ConfigError(f"{file}: damaged, tensor {name} of shape {list(shape)} has {there} bytes; copy it again")
    if 8 + length + end > size:
        raise ConfigError(
            f"{file}: truncated or damaged, it has {size:,} bytes and its tensors end at {8 + length + end:,}; copy it again"
        )
    return header, 8 + length


class SafetensorsWriter:
    """Writes a folder of safetensors files, tensor by tensor, at offsets known beforehand.

    `layout` lists (name, shape, dtype) in the order of the files. One file `model.safetensors` up to
    `max_shard_bytes`, else `model-00001-of-0000N.safetensors` with an index. Tensors may come in any order; `close`
    refuses to end with one missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        layout: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
        *,
        max_shard_bytes: int = 5_000_000_000,
        name: str = "model.safetensors",
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self._open: list[IO[bytes]] = []
        shards = _divide(layout, max_shard_bytes)
        count = len(shards)
        self._stem = stem = name.removesuffix(".safetensors")
        self._files = [name]
        if count > 1:
            self._files = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for number, (file, shard) in enumerate(zip(self._files, shards, strict=True)):
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name, shape, dtype in shard:
                end = offset + math.prod(shape) * dtype.itemsize
                header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
                self._places[name] = (number, offset, shape, dtype)
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            stream = open(self.folder / (file + ".part"), "wb")  # noqa: SIM115 (held open until close)
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)
            self._open.append(stream)
            for name, (where, start, shape, dtype) in list(self._places.items()):
                if where == number:
                    self._places[name] = (number, 8 + len(text) + start, shape, dtype)
        self._left = set(self._places)
        self._total = sum(math.prod(shape) * dtype.itemsize for _, _, shape, dtype in self._places.values())

    def write(self, name: str, tensor: Tensor) -> None:
        if name not in self._left:
            raise ValueError(f"tensor {name} was not announced, or was written before")
        number, offset, shape, dtype = self._places[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"tensor {name} is {tuple(tensor.shape)} {tensor.dtype}; {shape} {dtype} was announced")
        stream = self._open[number]
        stream.seek(offset)
        stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._left.discard(name)

    def close(self) -> None:
        if self._left:
            self.abort()
            raise ValueError(f"{len(self._left)} tensors were never written, the first is {min(self._left)}")
        for stream, file in zip(self._open, self._files, strict=True):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            os.replace(self.folder / (file + ".part"), self.folder / file)
        if len(self._files) > 1:
            weight_map = {name: self._files[place[0]] for name, place in sorted(self._places.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.folder / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def abort(self) -> None:
        """Removes what was written so far."""
        for stream, file in zip(self._open, self._files, strict=True):
            stream.close()
            (self.folder / (file + ".part")).unlink(missing_ok=True)


def _divide(
    layout: Iterable[tuple[str, tuple[int, ...], torch.dtype]], limit: int
) -> list[list[tuple[str, tuple[int, ...], torch.dtype]]]:
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    filled = 0
    for name, shape, dtype in layout:
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, tuple(shape), dtype))
        filled += size
    return shards


class TorchFilesReader:
    """The tensors of some files that torch.save wrote, read by PyTorch's restricted loader."""

    def __init__(self, files: Iterable[Path]):
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            stored = restricted.load(file)
            if not isinstance(stored, dict):
                raise ConfigError(f"{file}: holds a {type(stored).__name__}, not a model's tensors by name")
            others = [name for name, value in stored.items() if not isinstance(value, Tensor)]
            if others:
                raise ConfigError(f"{file}: {others[0]} is a {type(stored[others[0]]).__name__}, not a tensor")
            self._tensors.update(stored)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()


def iterate(reader: WeightReader) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a reader, one by one."""
    for name in reader.names():
        yield name, reader.read(name)
