"""MDS shards, as mosaicml-streaming writes and reads them: `index.json` and `shard.00000.mds[.zstd]`.

A shard, little-endian: u32 number of samples, u32 offsets of samples and end, the configuration as JSON, the samples. A
sample: a u32 size for each column of variable size, then the columns' bytes, in the order of the columns' names.
Samples that were pickled are refused: reading them could run anything. The values are `mds_values`'.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megalm.config.errors import ConfigError
from megalm.data.formats.mds_storage import HASHES, compress, decompress, parse_compression
from megalm.data.formats.mds_values import decode_value, encode_value, find_fixed_size
from megalm.data.formats.store import Cache, Store, is_url
from megalm.data.tokens import CODES, HEADER, MAGIC

SIZE_LIMIT = 1 << 26  # bytes of a shard before compression
TOKEN_INDEX = "tokens.idx"
OPEN_SHARDS = 64  # that stay mapped
ADVICE = "Restore the file from its source, or write the data set again."


class MDSWriter:
    """Writes samples into shards; `index.json` comes last, so that a folder with one is complete.

    `columns` maps names to encodings; `compression` is None, "zstd" or "zstd:LEVEL"; `hashes` are names out of HASHES.
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
        if compression is not None and compression.split(":")[0] != "zstd":
            raise ConfigError(f"compression {compression!r} is not written; choose None, 'zstd' or 'zstd:LEVEL'.")
        self.columns = dict(sorted(columns.items()))
        try:
            sizes = [find_fixed_size(encoding) for encoding in self.columns.values()]
            unknown = [name for name in hashes if name not in HASHES]
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}.") from error
        if unknown:
            raise ConfigError(f"hash {unknown[0]!r} is not known; choose among {', '.join(HASHES)}.")
        self.compression, self.hashes, self.size_limit = compression, sorted(set(hashes)), size_limit
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
            stored = compress(self.compression, raw)
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
    """Samples of a folder of MDS shards, by number or one after another; the folder may be a URL.

    Shards of an object store come through the cache: each is fetched and checked once on a machine. Local ones are
    mapped and checked when they are first touched; compressed ones are held one at a time, or decompressed into the
    cache if there is one.

    Errors: ConfigError with the file, the sample or byte and what to do, for anything that is missing, torn or refused.
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True, cache: Cache | None = None):
        self.remote = is_url(folder)
        self.cache = cache or (Cache() if self.remote else None)
        self.folder = os.fspath(folder).rstrip("/")
        self.verify = verify
        if self.remote:
            assert self.cache is not None
            self.store = Store(self.folder, self.cache.tries)
        path = f"{self.folder}/index.json"
        try:
            text = self.store.read("index.json") if self.remote else Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}). Give the folder that holds index.json."
            ) from error
        self.key = f"{self.folder}\0{xxhash.xxh3_128(text).hexdigest()}"
        try:
            index = json.loads(text)
            if index["version"] != 2:
                raise ConfigError(f"{path}: only MDS shards of version 2 are read.")
            self.shards = [_checked_info(path, shard) for shard in index["shards"]]
            if not self.remote:
                self._check_folders()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ConfigError(f"{path}: not an index of MDS shards that can be read ({error}). {ADVICE}") from error
        self.starts = np.concatenate(([0], np.cumsum([shard["samples"] for shard in self.shards], dtype=np.int64)))
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._seen: set[int] = set()  # whose checksums were compared
        self._lock = threading.Lock()

    def _check_folders(self) -> None:
        """Errors: ValueError if a folder that the index names leads out of this one by a link."""
        stored = (shard[kind]["basename"] for shard in self.shards for kind in ("raw_data", "zip_data") if shard[kind])
        top = os.path.realpath(self.folder)
        for folder in sorted({os.path.dirname(name) for name in stored} - {""}):
            if not os.path.realpath(os.path.join(top, folder)).startswith(top.rstrip("/") + "/"):
                raise ValueError(
                    f"the folder {folder!r} leads out of this one by a link: name the folder that it leads to"
                )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._sample(*self.find(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def has(self, name: str) -> bool:
        """Whether this file is in the folder."""
        return self.store.exists(name) if self.remote else os.path.exists(f"{self.folder}/{name}")

    def find(self, number: int) -> tuple[int, int]:
        """(shard, sample in it)."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder}: there is no sample {number}; there are {len(self)}")
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def prefetch(self, shard: int) -> None:
        """Begin to fetch a remote shard."""
        if self.remote and shard not in self._open:
            assert self.cache is not None
            self.cache.ahead(*self._request(shard))

    def shard(self, number: int) -> np.ndarray:
        """The whole raw shard. Shapes: -> uint8 [bytes]"""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        info = self.shards[number]
        raw_path = Path(self.folder) / info["raw_data"]["basename"]
        kept = OPEN_SHARDS
        if not self.remote and (raw_path.exists() or not info["zip_data"]):
            data = self._mapped(raw_path, info["raw_data"])
            if number not in self._seen:
                self._compared(str(raw_path), data, info["raw_data"])
                self._seen.add(number)
        elif self.cache is not None:
            for _ in range(3):  # another rank may make room between finding a shard and opening it
                path = self.cache.get(*self._request(number))
                with contextlib.suppress(FileNotFoundError):
                    data = np.asarray(np.memmap(path, np.uint8, "r"))
                    break
            else:
                raise ConfigError(
                    f"the data cache {self.cache.folder} is too small for these shards: raise data.cache_gb."
                )
        else:
            data, kept = np.frombuffer(self._fetch(number), np.uint8), 1
        with self._lock:
            self._open[number] = data
            while len(self._open) > kept:
                self._open.popitem(last=False)
        return data

    def _request(self, number: int) -> tuple[str, int, Callable[[], bytes]]:
        key = f"{self.key}\0{number}\0{self.verify}"
        return key, self.shards[number]["raw_data"]["bytes"], lambda: self._fetch(number)

    def _fetch(self, number: int) -> bytes:
        """A shard's raw bytes, compared with the index."""
        info = self.shards[number]
        stored = info["zip_data"] or info["raw_data"]
        path = f"{self.folder}/{stored['basename']}"
        if self.remote:
            data = self.store.read(stored["basename"])
        else:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise _named_but(path, error) from error
        self._compared(path, data, stored)
        if not info["zip_data"]:
            return data
        size = info["raw_data"]["bytes"]
        try:
            raw = decompress(info["compression"] or "zstd", data, size)
        except ValueError as error:
            raise ConfigError(f"{path}: cannot be decompressed ({error}). {ADVICE}") from error
        self._compared(path, raw, info["raw_data"])
        return raw

    def _mapped(self, path: Path, expected: dict[str, Any]) -> np.ndarray:
        try:
            return np.asarray(np.memmap(path, np.uint8, "r")) if os.stat(path).st_size else np.empty(0, np.uint8)
        except OSError as error:
            raise _named_but(str(path), error) from error

    def _compared(self, path: str, data: bytes | np.ndarray, expected: dict[str, Any]) -> None:
        if len(data) != expected["bytes"]:
            raise ConfigError(f"{path}: has {len(data)} bytes, index.json says {expected['bytes']}. {ADVICE}")
        for name, value in expected["hashes"].items() if self.verify else ():
            if HASHES[name](data) != value:  # type: ignore[arg-type]
                raise ConfigError(f"{path}: its {name} checksum is not {value}: the file is damaged. {ADVICE}")

    def _columns(self, shard: int, number: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The shard, and the bytes [start, stop) of each column of a sample in it. Errors: ValueError, struct.error"""
        data, info = self.shard(shard), self.shards[shard]
        view = data.data
        (count,) = struct.unpack_from("<I", view, 0)
        if number >= count or count != info["samples"]:
            raise ValueError(f"the shard holds {count} samples, index.json says {info['samples']}")
        start, stop = struct.unpack_from("<II", view, 4 * (1 + number))
        at = start
        sizes = list(info["column_sizes"])
        for column, fixed in enumerate(sizes):
            if fixed is None:
                (sizes[column],) = struct.unpack_from("<I", view, at)
                at += 4
        if not 4 * (count + 2) <= start <= stop <= len(data) or at + sum(sizes) != stop:
            raise ValueError(f"its bytes {start} to {stop} do not hold its columns of {sizes}")
        edges = [at, *(at + int(end) for end in np.cumsum(sizes))]
        return data, list(zip(edges, edges[1:], strict=False))

    def _sample(self, shard: int, number: int) -> dict[str, Any]:
        info = self.shards[shard]
        try:
            data, columns = self._columns(shard, number)
            return {
                name: decode_value(encoding, data[start:stop].tobytes())
                for name, encoding, (start, stop) in zip(
                    info["column_names"], info["column_encodings"], columns, strict=True
                )
            }
        except (ValueError, struct.error, RecursionError, OverflowError) as error:
            raise self.fault(shard, number, error) from error

    def column(self, shard: int, number: int, column: int) -> np.ndarray:
        """The bytes of one column of a sample, without a copy. Shapes: -> uint8 [bytes]"""
        try:
            data, columns = self._columns(shard, number)
        except (ValueError, struct.error) as error:
            raise self.fault(shard, number, error) from error
        return data[slice(*columns[column])]

    def fault(self, shard: int, number: int, error: Exception) -> ConfigError:
        where = f"{self.folder}/{self.shards[shard]['raw_data']['basename']}: sample {number}"
        return ConfigError(f"{where}: {error}. {ADVICE}")


def _checked_info(path: str, info: dict[str, Any]) -> dict[str, Any]:
    """One shard's entry of the index, complete and of the right types. Errors: ValueError, KeyError, TypeError"""
    if info["format"] != "mds" or info.get("version", 2) != 2:
        raise ConfigError(f"{path}: only MDS shards of version 2 are read.")
    names, encodings, sizes = info["column_names"], info["column_encodings"], info["column_sizes"]
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        if not isinstance(name, str) or not isinstance(encoding, str) or find_fixed_size(encoding) != size:
            raise ValueError(f"column {name!r} of {encoding!r} with the size {size!r}")
    parse_compression(info["compression"])
    if type(info["samples"]) is not int or not 0 <= info["samples"] < 1 << 32:
        raise ValueError(f"{info['samples']!r} samples")
    files = {"raw_data": info["raw_data"], "zip_data": info.get("zip_data")}
    for kind, file in files.items():
        if file is None and kind == "zip_data":
            continue
        name, size = file["basename"], file["bytes"]
        if not _is_below(name):
            raise ValueError(f"{name!r} is not the name of a file in the folder or below it")
        if type(size) is not int or not 0 <= size < 1 << 32:
            raise ValueError(f"{name} with {size!r} bytes")
        hashes = dict(file.get("hashes") or {})
        unknown = [key for key in hashes if key not in HASHES]
        if unknown:
            raise ValueError(f"checksum {unknown[0]!r} is not known, only {', '.join(HASHES)}")
        files[kind] = {"basename": name, "bytes": size, "hashes": hashes}
    return {**info, **files}


def _is_below(name: Any) -> bool:
    """Whether an index may name this file: one of its folder, or, where it was merged out of several, of a folder below."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _named_but(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be read ({error.strerror}), but index.json names it. {ADVICE}")


def write_token_documents(
    documents: Iterable[np.ndarray], folder: str | os.PathLike, dtype: np.dtype, **options: Any
) -> int:
    """Token documents as MDS samples with one column `tokens`; returns how many.

    `tokens.idx` beside the shards holds the documents' lengths, so that training from them opens at once.
    """
    folder, dtype = os.fspath(folder), np.dtype(dtype)
    lengths = array("i")
    with MDSWriter(folder, {"tokens": f"ndarray:{dtype.name}"}, **options) as writer:
        for document in documents:
            writer.write({"tokens": np.asarray(document).astype(dtype)})
            lengths.append(len(document))
    write_index(f"{folder}/{TOKEN_INDEX}", dtype, np.asarray(lengths, "<i4"))
    return len(lengths)


def write_index(path: str | os.PathLike, dtype: np.dtype, lengths: np.ndarray) -> None:
    """The index that a .bin of these documents would have: it tells where each document's tokens begin."""
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    header = HEADER.pack(MAGIC, 1, CODES[dtype.newbyteorder("=")], len(lengths), len(lengths) + 1)
    pointers = np.concatenate((np.zeros(1, "<i8"), ends[:-1])) if len(lengths) else np.empty(0, "<i8")
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    _write(Path(path), b"".join((header, lengths.astype("<i4").tobytes(), pointers.tobytes(), documents.tobytes())))


def read_token_documents(folder: str | os.PathLike, column: str = "tokens") -> Iterator[np.ndarray]:
    """Read the token arrays in a column of an MDS folder.

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
