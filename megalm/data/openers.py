"""Opens what `data.train` and `data.valid` name: token files and MDS shards, here or in an object store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

from megalm.config.data import DataConfig
from megalm.config.errors import ConfigError
from megalm.config.registry import Registry
from megalm.data.formats.mds_tokens import MDSTokens
from megalm.data.formats.store import DEFAULT_CACHE, Cache, Store, is_url
from megalm.data.packing import PackedSource
from megalm.data.pairs import PairedSource
from megalm.data.sources import TokenSource
from megalm.data.tokens import TokenFile

_KINDS = {"best_fit": PackedSource, "pairs": PairedSource}
"""What packs whole documents, by the word of data.packing."""


def name_sources(prefixes: Sequence[str]) -> list[str]:
    """Short names: the last part of the path without `_text_document`; whole paths if those are not distinct."""
    short = [prefix.rstrip("/").rsplit("/", 1)[-1].removesuffix("_text_document") for prefix in prefixes]
    return short if len(set(short)) == len(short) else list(prefixes)


def open_tokens(prefix: str | os.PathLike, data: DataConfig) -> TokenFile:
    """Open a .bin/.idx pair or a folder of MDS shards, on this machine or in an object store."""
    prefix = os.fspath(prefix)
    scheme, _, rest = prefix.partition("://")
    if rest and scheme in OPENERS:
        return OPENERS[scheme](rest, data)
    cache = choose_cache(data) if is_url(prefix) else None
    folder = prefix.rstrip("/")
    if Store(folder, data.retries).exists("index.json") if is_url(prefix) else os.path.exists(f"{folder}/index.json"):
        return MDSTokens(folder, cache or choose_cache(data), data.mds_bytes)
    return TokenFile(prefix, cache)


OpenTokens = Callable[[str, DataConfig], TokenFile]
"""Opens what stands behind SCHEME:// as documents of tokens; a pure function: the same tokens in every process."""

OPENERS: Registry[OpenTokens] = Registry("source of tokens", "data.train")


def register_token_source(scheme: str, open_source: OpenTokens) -> None:
    """Let `data.train=[SCHEME://REST]` be opened by open_source(REST, config.data). Errors: ValueError where it is taken."""
    OPENERS.register(scheme, open_source)


def choose_cache(data: DataConfig) -> Cache:
    """Choose the process' cache of remote data, one for each folder."""
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
            "`make data` makes that one, `megalm tokenize --help` says how to make your own."
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
    kind = _KINDS.get(data.packing, TokenSource)
    sources = []
    for number, (name, prefix) in enumerate(zip(name_sources(data.train), data.train, strict=True)):
        file = open_tokens(prefix, data)
        weight = float(file.num_tokens) if data.weights is None else float(data.weights[number])
        sources.append(kind(name, file, seq_length, weight, holdout))
    return sources


def open_held_out(data: DataConfig, seq_length: int, sources: Sequence[TokenSource]) -> list[TokenSource]:
    """Open what evaluation reads: the file `data.valid` names, else the held-out ends of the sources themselves."""
    if data.valid is None:
        return [source.held_out() for source in sources]
    kind = _KINDS.get(data.packing, TokenSource)
    return [kind(name_sources([data.valid])[0], open_tokens(data.valid, data), seq_length, 1.0, 1.0).held_out()]
