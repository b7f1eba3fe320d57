"""MDS shards, as mosaicml-streaming writes and reads them: `index.json` and `shard.00000.mds[.zstd]`.

A shard, little-endian: u32 number of samples, u32 offsets of samples and end, the configuration as JSON, the samples. A
sample: a u32 size for each column of variable size, then the columns' bytes, in the order of the columns' names.
Samples that were pickled are refused: reading them could run anything.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from megalm.config.errors import ConfigError

SIZE_LIMIT = 1 << 26  # bytes of a shard before compression
ADVICE = "Restore the file from its source, or write the data set again."
_NAMES = [sign + name for sign in ("", "u") for name in ("int8", "int16", "int32", "int64")] + [
    "float16",
    "float32",
    "float64",
]
SCALARS: dict[str, np.dtype] = {name: np.dtype(name).newbyteorder("<") for name in _NAMES}
SCALARS["int"] = SCALARS["int64"]
ARRAY_CODES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip


def _array_parts(encoding: str) -> tuple[str | None, tuple[int, ...] | None]:
    """`ndarray[:dtype[:d0,d1]]` -> (dtype, shape); None where each sample says it itself."""
    _, *parts = encoding.split(":")
    if len(parts) > 2 or (parts and parts[0] not in ARRAY_CODES.values()):
        raise ValueError(f"unknown encoding {encoding!r}")
    shape = tuple(int(side) for side in parts[1].split(",")) if len(parts) > 1 else None
    return (parts[0] if parts else None), shape


def fixed_size(encoding: str) -> int | None:
    """Bytes of a value of this encoding; None: they differ from sample to sample."""
    if encoding in SCALARS:
        return SCALARS[encoding].itemsize
    if encoding.startswith("ndarray"):
        dtype, shape = _array_parts(encoding)
        return np.dtype(dtype).itemsize * int(np.prod(shape)) if dtype and shape is not None else None
    if encoding in ("bytes", "str", "json", "str_int", "str_float", "str_decimal"):
        return None
    raise ValueError(f"encoding {encoding!r} is not supported (pickled and image columns are not read)")


def encode_value(encoding: str, value: Any) -> bytes:
    """The bytes of one value. Errors: ValueError if the value is not of the encoding."""
    if encoding == "bytes":
        return bytes(value)
    if encoding == "str":
        return value.encode("utf-8")
    if encoding == "json":
        return json.dumps(value).encode("utf-8")
    if encoding.startswith("str_"):
        return str(value).encode("utf-8")
    if encoding in SCALARS:
        return np.array(value, SCALARS[encoding]).tobytes()
    dtype, shape = _array_parts(encoding)
    array = np.asarray(value)
    if dtype is not None and array.dtype != np.dtype(dtype):
        raise ValueError(f"the array is {array.dtype}, the column {encoding}")
    if shape is not None:
        if array.shape != shape:
            raise ValueError(f"the array's shape is {array.shape}, the column's {shape}")
        return np.ascontiguousarray(array).tobytes()
    head = b"" if dtype else bytes([next(code for code, name in ARRAY_CODES.items() if name == array.dtype.name)])
    log2 = next(power for power in range(4) if max(array.shape, default=0) < 1 << (8 << power))
    sides = b"".join(int(side).to_bytes(1 << log2, "little") for side in array.shape)
    return head + bytes([array.ndim << 2 | log2]) + sides + np.ascontiguousarray(array).tobytes()


def decode_value(encoding: str, data: bytes) -> Any:
    """The value of these bytes. Errors: ValueError if they are not a value of the encoding."""
    if encoding == "bytes":
        return data
    if encoding in ("str", "str_decimal"):
        return data.decode("utf-8")
    if encoding == "json":
        return json.loads(data)
    if encoding == "str_int":
        return int(data)
    if encoding == "str_float":
        return float(data)
    if encoding in SCALARS:
        if len(data) != SCALARS[encoding].itemsize:
            raise ValueError(f"{len(data)} bytes are not a value of {encoding}")
        return np.frombuffer(data, SCALARS[encoding])[0].item()
    dtype, shape = _array_parts(encoding)
    at = 0
    if dtype is None:
        if not data or data[0] not in ARRAY_CODES:
            raise ValueError("the array does not say its type")
        dtype, at = ARRAY_CODES[data[0]], 1
    if shape is None:
        if at >= len(data):
            raise ValueError("the array does not say its shape")
        dimensions, width = data[at] >> 2, 1 << (data[at] & 3)
        ends = range(at + 1 + width, at + 1 + width * dimensions + 1, width)
        shape = tuple(int.from_bytes(data[end - width : end], "little") for end in ends)
        at += 1 + width * dimensions
    elements = int(np.prod(shape, dtype=object)) if shape else 1
    if elements * np.dtype(dtype).itemsize != len(data) - at:
        raise ValueError(f"an array of shape {shape} does not fit {len(data) - at} bytes")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), elements, at).reshape(shape)


HASHES: dict[str, Callable[[bytes], str]] = {
    "xxh64": lambda data: xxhash.xxh64(data).hexdigest(),
    "xxh32": lambda data: xxhash.xxh32(data).hexdigest(),
    "xxh128": lambda data: xxhash.xxh128(data).hexdigest(),
    "xxh3_64": lambda data: xxhash.xxh3_64(data).hexdigest(),
    "xxh3_128": lambda data: xxhash.xxh3_128(data).hexdigest(),
}


class MDSWriter:
    """Writes samples into shards; `index.json` comes last, so that a folder with one is complete.

    `columns` maps names to encodings; `compression` is None or "zstd"; `hashes` are names out of HASHES.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        columns: dict[str, str],
        *,
        compression: str | None = None,
        hashes: Sequence[str] = (),
        size_limit: int = SIZE_LIMIT,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "index.json").exists():
            raise ConfigError(f"{self.folder}: there is an index.json already. Write to another folder.")
        if compression not in (None, "zstd"):
            raise ConfigError(f"compression {compression!r} is not known; choose None or 'zstd'.")
        self.columns = dict(sorted(columns.items()))
        try:
            sizes = [fixed_size(encoding) for encoding in self.columns.values()]
            unknown = [name for name in hashes if name not in HASHES]
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}.") from error
        if unknown:
            raise ConfigError(f"hash {unknown[0]!r} is not known; choose among {', '.join(HASHES)}.")
        self.compression, self.hashes, self.size_limit = compression, list(hashes), size_limit
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": self.hashes,
            "size_limit": size_limit,
            "column_names": list(self.columns),
            "column_encodings": list(self.columns.values()),
            "column_sizes": sizes,
        }
        self._head = json.dumps(self._config, sort_keys=True).encode("utf-8")
        self._samples: list[bytes] = []
        self._held = 8 + len(self._head)
        self._shards: list[dict[str, Any]] = []

    def write(self, sample: dict[str, Any]) -> None:
        """One sample: a value for each column."""
        sizes, values = [], []
        for (name, encoding), fixed in zip(self.columns.items(), self._config["column_sizes"], strict=True):  # type: ignore[call-overload]
            value = encode_value(encoding, sample[name])
            values.append(value)
            if fixed is None:
                sizes.append(struct.pack("<I", len(value)))
        data = b"".join(sizes + values)
        if self._samples and self._held + len(data) + 4 > self.size_limit:
            self._flush()
        self._samples.append(data)
        self._held += len(data) + 4

    def _flush(self) -> None:
        count = len(self._samples)
        start = 4 + 4 * (count + 1) + len(self._head)
        offsets = start + np.concatenate(([0], np.cumsum([len(sample) for sample in self._samples])))
        raw = struct.pack("<I", count) + offsets.astype("<u4").tobytes() + self._head + b"".join(self._samples)
        name = f"shard.{len(self._shards):05}.mds"
        info: dict[str, Any] = {**self._config, "samples": count, "raw_data": self._info(name, raw), "zip_data": None}
        stored = raw
        if self.compression:
            stored = zstandard.ZstdCompressor(level=3).compress(raw)
            name += ".zstd"
            info["zip_data"] = self._info(name, stored)
        _write(self.folder / name, stored)
        self._shards.append(info)
        self._samples, self._held = [], 8 + len(self._head)

    def _info(self, name: str, data: bytes) -> dict[str, Any]:
        return {"basename": name, "bytes": len(data), "hashes": {name: HASHES[name](data) for name in self.hashes}}

    def finish(self) -> None:
        """Writes the last shard and the index."""
        if self._samples:
            self._flush()
        _write(self.folder / "index.json", json.dumps({"version": 2, "shards": self._shards}, sort_keys=True).encode())

    def __enter__(self) -> MDSWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.finish()


def _write(path: Path, data: bytes) -> None:
    with open(f"{path}.partial", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


class MDSReader:
    """Samples of a folder of MDS shards, by number or one after another; one shard is held at a time.

    Errors: ConfigError with the file, the sample or byte and what to do, for anything that is missing, torn or refused.
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.shards = list(index["shards"])
            if index["version"] != 2 or any(shard["format"] != "mds" for shard in self.shards):
                raise ConfigError(f"{path}: only MDS shards of version 2 are read.")
            counts = [int(shard["samples"]) for shard in self.shards]
            for shard in self.shards:
                for encoding, size in zip(shard["column_encodings"], shard["column_sizes"], strict=True):
                    if fixed_size(encoding) != size:
                        raise ValueError(f"{encoding} with the size {size}")
                if shard["compression"] is not None and not str(shard["compression"]).startswith("zstd"):
                    raise ValueError(f"compression {shard['compression']!r} is not read, only zstd")
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}). Give the folder that holds index.json."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not an index of MDS shards that can be read ({error}). {ADVICE}") from error
        self._starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self._open: tuple[int, bytes] = (-1, b"")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder}: there is no sample {number}; there are {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        if self._open[0] != shard:
            self._open = (shard, self._shard(shard))
        return self._sample(shard, self._open[1], number - int(self._starts[shard]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def _shard(self, number: int) -> bytes:
        info = self.shards[number]
        raw_path = self.folder / info["raw_data"]["basename"]
        if raw_path.exists() or not info["zip_data"]:
            return self._checked(raw_path, info["raw_data"])
        path = self.folder / info["zip_data"]["basename"]
        try:
            stored = self._checked(path, info["zip_data"])
            raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=int(info["raw_data"]["bytes"]))
        except zstandard.ZstdError as error:
            raise ConfigError(f"{path}: cannot be decompressed ({error}). {ADVICE}") from error
        return self._compared(path, raw, info["raw_data"])

    def _checked(self, path: Path, expected: dict[str, Any]) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}), but index.json names it. {ADVICE}"
            ) from error
        return self._compared(path, data, expected)

    def _compared(self, path: Path, data: bytes, expected: dict[str, Any]) -> bytes:
        if len(data) != expected["bytes"]:
            raise ConfigError(f"{path}: has {len(data)} bytes, index.json says {expected['bytes']}. {ADVICE}")
        for name, value in (expected.get("hashes") or {}).items() if self.verify else ():
            if name in HASHES and HASHES[name](data) != value:
                raise ConfigError(f"{path}: its {name} checksum is not {value}: the file is damaged. {ADVICE}")
        return data

    def _sample(self, shard: int, data: bytes, number: int) -> dict[str, Any]:
        info = self.shards[shard]
        where = f"{self.folder / info['raw_data']['basename']}: sample {number}"
        try:
            (count,) = struct.unpack_from("<I", data, 0)
            if number >= count:
                raise ValueError(f"the shard holds only {count} samples")
            start, stop = struct.unpack_from("<II", data, 4 * (1 + number))
            at = start
            sizes = list(info["column_sizes"])
            for column, fixed in enumerate(sizes):
                if fixed is None:
                    (sizes[column],) = struct.unpack_from("<I", data, at)
                    at += 4
            if not 4 * (count + 2) <= start <= stop <= len(data) or at + sum(sizes) != stop:
                raise ValueError(f"its bytes {start} to {stop} do not hold its columns of {sizes}")
            sample = {}
            for name, encoding, size in zip(info["column_names"], info["column_encodings"], sizes, strict=True):
                sample[name] = decode_value(encoding, data[at : at + size])
                at += size
            return sample
        except (ValueError, struct.error) as error:
            raise ConfigError(f"{where}: {error}. {ADVICE}") from error


def write_token_documents(
    documents: Iterable[np.ndarray], folder: str | os.PathLike, dtype: np.dtype, **options: Any
) -> int:
    """Token documents as MDS samples with one column `tokens`; returns how many."""
    count = 0
    with MDSWriter(folder, {"tokens": f"ndarray:{np.dtype(dtype).name}"}, **options) as writer:
        for document in documents:
            writer.write({"tokens": np.asarray(document).astype(dtype)})
            count += 1
    return count


def read_token_documents(folder: str | os.PathLike, column: str = "tokens") -> Iterator[np.ndarray]:
    """The token arrays in a column of an MDS folder.

    Errors: ConfigError if there is no such column, or it does not hold one-dimensional arrays of integers.
    """
    reader = MDSReader(folder)
    for number, sample in enumerate(reader):
        tokens = sample.get(column)
        if isinstance(tokens, bytes):
            raise ConfigError(
                f"{folder}: column {column!r} is raw bytes: which type its tokens have is not written down."
            )
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ConfigError(
                f"{folder}: sample {number}: column {column!r} is not an array of tokens; there are {', '.join(sample)}."
            )
        yield tokens
