"""A source of samples: one token file, cut into a training part and a held-out end, both cut into samples of one
length.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megalm.config.data import DataConfig
from megalm.config.errors import ConfigError
from megalm.data.mds_tokens import MDSTokens
from megalm.data.store import DEFAULT_CACHE, Cache, Store, is_url
from megalm.data.tokens import TokenFile


class TokenSource:
    """Samples of `seq_length` + 1 tokens from one file; neighbours share one token, so that every token but the
    first is predicted once.

    The last `holdout` share of the documents is never trained on; the cut is looked up in the index, at any size in
    constant time. A file of a single document is cut by tokens; `holdout` 1 keeps all of it for evaluation.
    """

    def __init__(self, name: str, file: TokenFile, seq_length: int, weight: float, holdout: float):
        self.name, self.file, self.seq_length, self.weight = name, file, seq_length, weight
        if holdout >= 1:
            self.train_tokens = 0
        elif holdout <= 0:
            self.train_tokens = file.num_tokens
        elif file.num_documents > 1:
            held = min(file.num_documents - 1, math.ceil(file.num_documents * holdout))
            self.train_tokens = file.document_start(file.num_documents - held)
        else:
            self.train_tokens = file.num_tokens - math.ceil(file.num_tokens * holdout)
        self.num_samples = max(0, (self.train_tokens - 1) // seq_length)
        self.held_out_end = file.num_tokens
        self.num_held_out = max(0, math.ceil((file.num_tokens - self.train_tokens - 1) / seq_length))

    def read(self, index: int, length: int | None = None) -> np.ndarray:
        """Sample `index` of those of `length` tokens (default: `seq_length`). Shapes: -> int64 [length + 1]"""
        length = length or self.seq_length
        return self.file.read(index * length, (index + 1) * length + 1)

    def read_into(self, row: np.ndarray, index: int) -> None:
        """Sample `index` of those of the row's length. Shapes: row [length + 1], of a type that holds the tokens"""
        start = index * (len(row) - 1)
        row[:] = self.file.tokens[start : start + len(row)]

    def prefetch(self, index: int, length: int) -> None:
        """The sample will be read soon."""
        self.file.prefetch(index * length, (index + 1) * length + 1)

    def read_held_out(self, index: int) -> np.ndarray:
        """The last one may be shorter. Shapes: -> int64 [<= S + 1]"""
        start = self.held_out_start(index)
        return self.file.read(start, min(start + self.seq_length + 1, self.held_out_end))

    def held_out_start(self, index: int) -> int:
        """Which token of the file is the first of this held-out sequence."""
        return self.train_tokens + index * self.seq_length

    def boundaries(self, index: int, length: int | None = None) -> np.ndarray:
        """Positions in (0, length] of the sample where a new document begins."""
        length = length or self.seq_length
        start = index * length
        return self.file.document_starts(start, start + length + 1)[1] - start

    def token_at(self, index: int, length: int, at: int) -> int:
        """Which token of the file is token `at` of the sample."""
        return index * length + at

    def filled(self, index: int, length: int | None = None) -> int:
        """Tokens of the sample; what follows them is padding."""
        return (length or self.seq_length) + 1

    def locate(self, index: int, length: int | None = None) -> dict[str, Any]:
        """Where the sample lies: document, token inside it, token of the file, byte of .bin."""
        start = index * (length or self.seq_length)
        document = self.file.document_at(start)
        return {
            "document": document,
            "offset": start - self.file.document_start(document),
            "token": start,
            "byte": start * self.file.dtype.itemsize,
        }


def source_names(prefixes: Sequence[str]) -> list[str]:
    """Short names: the last part of the path without `_text_document`; whole paths if those are not distinct."""
    short = [prefix.rstrip("/").rsplit("/", 1)[-1].removesuffix("_text_document") for prefix in prefixes]
    return short if len(set(short)) == len(short) else list(prefixes)


def open_tokens(prefix: str | os.PathLike, data: DataConfig) -> TokenFile:
    """A .bin/.idx pair or a folder of MDS shards, on this machine or in an object store."""
    prefix = os.fspath(prefix)
    cache = data_cache(data) if is_url(prefix) else None
    folder = prefix.rstrip("/")
    if Store(folder, data.retries).exists("index.json") if is_url(prefix) else os.path.exists(f"{folder}/index.json"):
        return MDSTokens(folder, cache or data_cache(data), data.mds_bytes)
    return TokenFile(prefix, cache)


def data_cache(data: DataConfig) -> Cache:
    """The process' cache of remote data, one for each folder."""
    if data.cache_gb <= 0 or data.retries < 1:
        raise ConfigError(
            f"data.cache_gb={data.cache_gb} and data.retries={data.retries}: the cache needs room, and a request one try."
        )
    return _cache(data.cache or DEFAULT_CACHE, data.cache_gb * 1e9, data.retries)


@lru_cache
def _cache(folder: str, limit: float, tries: int) -> Cache:
    return Cache(folder, limit, tries)


def open_sources(data: DataConfig, seq_length: int) -> list[TokenSource]:
    """Opens what `data.train` names, with `data.weights` (or sizes), and cuts off the held-out part.

    Errors: ConfigError if nothing is configured, a number does not fit, or a file cannot be used.
    """
    if not data.train:
        raise ConfigError(
            "data.train is empty: give prefixes of tokenized data, for example data.train=[data/python_text_document]; "
            "`make data` makes that one, `python -m tools.tokenize --help` says how to make your own."
        )
    if data.weights is not None and len(data.weights) != len(data.train):
        raise ConfigError(
            f"data.weights has {len(data.weights)} numbers for {len(data.train)} sources in data.train: give one for "
            f"each, or null "
            "to weigh them by size."
        )
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout is {data.holdout}: give a share from 0 up to, but not including, 1.")
    holdout = data.holdout if data.valid is None else 0.0
    from megalm.data.packing import PackedSource  # which is a TokenSource

    kind = PackedSource if data.packing == "best_fit" else TokenSource
    sources = []
    for number, (name, prefix) in enumerate(zip(source_names(data.train), data.train, strict=True)):
        file = open_tokens(prefix, data)
        weight = float(file.num_tokens) if data.weights is None else float(data.weights[number])
        sources.append(kind(name, file, seq_length, weight, holdout))
    return sources


def open_held_out(data: DataConfig, seq_length: int, sources: Sequence[TokenSource]) -> list[TokenSource]:
    """What evaluation reads: the file `data.valid` names, else the held-out ends of the sources themselves."""
    if data.valid is None:
        return list(sources)
    return [TokenSource(source_names([data.valid])[0], open_tokens(data.valid, data), seq_length, 1.0, 1.0)]
