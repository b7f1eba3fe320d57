"""MDS shards of token documents under the face of a token file, so that training reads them in the same order.

Where each document's tokens begin is known from `tokens.idx`, which tools/tokenize leaves beside the shards; from the
column's own shape, where every sample has the same number of tokens; else from the shards, which are looked through once
(of uncompressed ones with one column only the tables at their beginnings), and kept in the cache.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.formats.mds import TOKEN_INDEX, MDSReader, write_index
from megalm.data.formats.mds_values import ARRAY_CODES, decode_array, find_fixed_size
from megalm.data.formats.store import Cache, LocalFile, open_bytes
from megalm.data.tokens import CODES, DTYPES, TOKEN_CODES, TokenFile

COLUMNS = ("tokens", "input_ids", "token_ids")
INTEGERS = {np.dtype(DTYPES[code]).name for code in TOKEN_CODES} | {"uint32"}


class Even:
    """start + step * i as an array that takes no room."""

    def __init__(self, step: int, count: int):
        self.step, self.count = step, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return np.arange(*index.indices(self.count), dtype=np.int64) * self.step
        if np.ndim(index) == 0:
            number = int(index) + (self.count if int(index) < 0 else 0)
            if not 0 <= number < self.count:
                raise IndexError(index)
            return np.int64(number * self.step)
        return np.asarray(index, np.int64) * self.step

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class MDSTokens(TokenFile):
    """The documents of a folder of MDS shards, here or in a store, as one stream of tokens.

    raw_type: type of the tokens, where the column is raw bytes.
    Errors: ConfigError with the file, the sample and what to do.
    """

    def __init__(self, folder: str | os.PathLike, cache: Cache, raw_type: str = "int64"):
        self.reader = MDSReader(folder, cache=cache)
        self.cache: Cache = cache
        self.prefix = self.tokens_path = self.reader.folder
        self.index_path = f"{self.prefix}/index.json"
        if not len(self.reader):
            raise ConfigError(f"{self.index_path}: there are no samples. Write the data set again.")
        self.raw_type = raw_type
        self._choose_column()
        if self.encoding.count(":") == 2:
            each = int(find_fixed_size(self.encoding) or 0) // self.dtype.itemsize
            self.lengths = np.broadcast_to(np.int32(each), (len(self.reader),))
            self.pointers: Any = Even(each * self.dtype.itemsize, len(self.reader))
            self.documents: Any = Even(1, len(self.reader) + 1)
            self.num_sequences = self.num_documents = len(self.reader)
            end = each * self.dtype.itemsize * len(self.reader)
        else:
            end = self._read_lengths()
        self.num_tokens = end // self.dtype.itemsize
        if self.num_tokens == 0:
            raise ConfigError(f"{self.prefix}: holds no token. Write the data set again.")
        self.tokens = ShardTokens(self)

    def _choose_column(self) -> None:
        info = self.reader.shards[0]
        names = info["column_names"]
        name = next((name for name in COLUMNS if name in names), None)
        alike = all(
            (shard["column_names"], shard["column_encodings"]) == (names, info["column_encodings"])
            for shard in self.reader.shards
        )
        if name is None or not alike:
            what = f"columns {', '.join(names)}" if alike else "shards with different columns"
            raise ConfigError(f"{self.prefix}: has {what}; tokens are in a column named {', '.join(COLUMNS)}.")
        self.column = names.index(name)
        self.encoding = info["column_encodings"][self.column]
        if self.encoding == "bytes":
            kind = self.raw_type
        elif self.encoding.startswith("ndarray:"):
            kind = self.encoding.split(":")[1]
        elif self.encoding == "ndarray":
            value = self.reader.column(0, 0, self.column)
            kind = ARRAY_CODES.get(int(value[0]) if len(value) else -1, "nothing")
        else:
            kind = self.encoding
        if kind not in INTEGERS:
            raise ConfigError(f"{self.prefix}: column {name!r} is {self.encoding}; tokens are arrays of integers.")
        if "," in self.encoding.split(":")[-1]:
            raise ConfigError(
                f"{self.prefix}: column {name!r} is {self.encoding}, of several dimensions; tokens have one: write each row as "
                "a sample."
            )
        self.dtype = np.dtype(kind).newbyteorder("<")

    def _read_lengths(self) -> int:
        beside = f"{self.prefix}/{TOKEN_INDEX}"
        if self.reader.has(TOKEN_INDEX):
            end = self._read_index(open_bytes(beside, self.cache))
            if self.num_documents != len(self.reader):
                raise ConfigError(
                    f"{beside}: is of {self.num_documents} documents, and index.json of {len(self.reader)}: it belongs to "
                    "another data set. Remove it, or write both again."
                )
            return end
        lengths = np.concatenate(self._look_through())
        size = 34 + 20 * len(lengths) + 8
        dtype = self.dtype if self.dtype.newbyteorder("=") in CODES else np.dtype(np.int32)

        def made() -> bytes:
            path = self.cache.folder / f"index.{os.getpid()}"
            write_index(path, dtype, lengths)
            data = path.read_bytes()
            path.unlink()
            return data

        kind = self.dtype
        end = self._read_index(LocalFile(self.cache.get(f"{self.reader.key}\0lengths\0{kind}", size, made)))
        self.dtype = kind
        return end

    def _look_through(self) -> list[np.ndarray]:
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self._shard_lengths, range(len(self.reader.shards))))

    def _shard_lengths(self, number: int) -> np.ndarray:
        """Tokens of each sample. Shapes: -> int32 [samples]"""
        info, reader = self.reader.shards[number], self.reader
        count, item = info["samples"], self.dtype.itemsize
        if reader.remote and not info["zip_data"] and len(info["column_names"]) == 1:
            table = reader.store.read(info["raw_data"]["basename"], 0, 4 * (count + 2))
            offsets = np.frombuffer(table, "<u4").astype(np.int64)[1:]
            return self._lengths_of(number, np.diff(offsets) - 4, item)
        sizes = np.array([len(reader.column(number, sample, self.column)) for sample in range(count)], np.int64)
        return self._lengths_of(number, sizes, item)

    def _lengths_of(self, shard: int, sizes: np.ndarray, item: int) -> np.ndarray:
        """From the bytes of the values: what is before an array's elements depends on how long it is."""
        if self.encoding == "bytes":
            lengths, rest = np.divmod(sizes, item)
            wrong = (rest != 0) | (sizes < 0)
        else:
            head = 1 if self.encoding != "ndarray" else 2
            lengths, wrong = np.zeros_like(sizes), np.ones(len(sizes), bool)
            for power in reversed(range(4)):
                width = 1 << power
                found, rest = np.divmod(sizes - head - width, item)
                fits = (rest == 0) & (found >= 0) & (found < 1 << min(62, 8 * width))
                fits &= (power == 0) | (found >= 1 << (4 * width))
                lengths[fits], wrong[fits] = found[fits], False
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise ConfigError(
                f"{self.prefix}/{self.reader.shards[shard]['raw_data']['basename']}: sample {bad}: {sizes[bad]} bytes are not "
                f"a one-dimensional array of {self.dtype.name}. Write the data set again."
            )
        return lengths.astype(np.int32)

    def prefetch(self, start: int, stop: int) -> None:
        """Tokens [start, stop) will be read soon; begin to fetch their shards, where they are far away."""
        if not self.reader.remote:
            return
        first, last = self.document_at(start), self.document_at(max(start, min(stop, self.num_tokens) - 1))
        for shard in range(self.reader.find(first)[0], self.reader.find(last)[0] + 1):
            self.reader.prefetch(shard)

    def value(self, document: int) -> np.ndarray:
        """A document's tokens, out of its shard."""
        shard, number = self.reader.find(document)
        raw = self.reader.column(shard, number, self.column)
        try:
            plain = self.encoding == "bytes"
            found = np.frombuffer(raw, self.dtype) if plain else decode_array(self.encoding, raw)
            if found.ndim != 1:
                raise ValueError(f"its array has the shape {found.shape}; tokens have one dimension")
        except ValueError as error:
            raise self.reader.fault(shard, number, error) from error
        if len(found) != self.lengths[document] or found.dtype.newbyteorder("=") != self.dtype.newbyteorder("="):
            message = f"it holds {len(found)} tokens of {found.dtype}, not {self.lengths[document]} of {self.dtype}"
            raise self.reader.fault(shard, number, ValueError(message))
        return found


class ShardTokens:
    """The tokens of all documents one after another; a slice is put together from the shards that hold it."""

    def __init__(self, file: MDSTokens):
        self.file, self.dtype = file, file.dtype

    def __len__(self) -> int:
        return self.file.num_tokens

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            number = int(index)
            return self[number : number + 1][0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError("tokens are read in steps of one")
        parts, file = [], self.file
        document = file.document_at(start) if start < stop else 0
        while start < stop:
            first = file.document_start(document)
            values = file.value(document)[start - first : stop - first]
            parts.append(values)
            start += len(values)
            document += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self.dtype)
