"""Token files that other programs write: llm.c's and modded-nanogpt's .bin, arrays of numpy, datatrove's .ds, and raw tokens
(nanoGPT's .bin, OLMo's .npy), whose type no header tells."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.formats.store import Bytes, Cache, Store, is_url, open_bytes

LLM_C_HEADER = 1024  # bytes: 256 numbers, of which the first three are a mark, a version, and how many tokens follow
LLM_C: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}  # GPT-2, Llama 3
NPY = b"\x93NUMPY"
RAW_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")
MOST = 2**31 - 1


class ForeignTokens(NamedTuple):
    """The tokens of such a file, in one row, which are read where they are looked at."""

    format: str
    tokens: Any
    ends: np.ndarray | None
    """Where documents end, if the file says so."""


def is_there(path: str) -> bool:
    """Whether there is such a file, here or in a store."""
    return Store(path).exists() if is_url(path) else os.path.isfile(path)


def open_foreign(path: str, token_type: str | None = None, cache: Cache | None = None) -> ForeignTokens:
    """Open the tokens of a file. token_type: that of raw tokens; of others their header tells it.

    Errors: ConfigError for a file that cannot be read, is damaged, or whose type is not known.
    """
    file = open_bytes(path, cache)
    found = _llm_c(file) or _npy(file) or _datatrove(file, path, cache)
    if found is not None:
        given = np.dtype(found.tokens.dtype).name
        if token_type not in (None, given):
            raise ConfigError(f"{path}: is {found.format} of {given}, not {token_type}: leave out the type.")
        return found
    if token_type is None:
        raise ConfigError(
            f"{path}: no header says which type its tokens have. If they are raw tokens, as nanoGPT and OLMo write them, name "
            f"it: --token-type {' or '.join(RAW_TYPES)}."
        )
    dtype = np.dtype(token_type).newbyteorder("<")
    if file.size == 0 or file.size % dtype.itemsize:
        raise ConfigError(f"{path}: its {file.size} bytes are not tokens of {token_type}.")
    return ForeignTokens("raw tokens", file.array(0, dtype, file.size // dtype.itemsize), None)


def format_of(path: str) -> str:
    """What kind of token file this is, in words; empty where it does not say so."""
    try:
        file = open_bytes(path, None)
        found = _llm_c(file) or _npy(file) or _datatrove(file, path, None)
    except ConfigError:
        return ""
    return found.format if found else ""


def _llm_c(file: Bytes) -> ForeignTokens | None:
    head = np.frombuffer(file.read(0, 12).tobytes(), "<i4") if file.size >= LLM_C_HEADER else np.zeros(3, "<i4")
    mark, version, count = map(int, head)
    if mark not in {known for known, _ in LLM_C}:
        return None
    dtype = LLM_C.get((mark, version))
    if dtype is None or file.size != LLM_C_HEADER + count * dtype.itemsize:
        raise ConfigError(
            f"{file.name}: is a token file of llm.c, version {version}, of {file.size} bytes for {count} tokens: it is damaged, "
            "or of a version that is not known."
        )
    return ForeignTokens("a token file of llm.c or modded-nanogpt", file.array(LLM_C_HEADER, dtype, count), None)


def _npy(file: Bytes) -> ForeignTokens | None:
    head = io.BytesIO(file.read(0, min(file.size, 1 << 16)).tobytes())
    if head.getvalue()[:6] != NPY:
        return None
    try:
        first = np.lib.format.read_magic(head) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(head)
    except ValueError as error:
        raise ConfigError(f"{file.name}: is an array of numpy with a damaged header ({error}).") from error
    if dtype.kind not in "ui" or len(shape) not in (1, 2) or (by_columns and len(shape) == 2):
        raise ConfigError(
            f"{file.name}: is an array of {dtype} of the shape {shape}; tokens are integers, in one row or in rows."
        )
    count = int(np.prod(shape, dtype=object))
    if file.size != head.tell() + count * dtype.itemsize:
        raise ConfigError(
            f"{file.name}: has {file.size} bytes, its header asks for {head.tell() + count * dtype.itemsize}."
        )
    if head.tell() % dtype.itemsize:
        raise ConfigError(
            f"{file.name}: its header of {head.tell()} bytes is not aligned: write it again by numpy.save."
        )
    ends = np.arange(1, shape[0] + 1, dtype=np.int64) * shape[1] if len(shape) == 2 else None
    return ForeignTokens("an array of numpy", file.array(head.tell(), dtype, count), ends)


def _datatrove(file: Bytes, path: str, cache: Cache | None) -> ForeignTokens | None:
    if not path.endswith(".ds") or not is_there(f"{path}.index"):
        return None
    index = open_bytes(f"{path}.index", cache)
    ends = np.asarray(index.array(0, np.dtype("<u8"), index.size // 8)[:]).astype(np.int64)
    total = int(ends[-1]) if len(ends) else 0
    size = file.size // total if total > 0 else 0
    if index.size % 8 or size not in (2, 4) or size * total != file.size or (np.diff(ends, prepend=0) < 0).any():
        raise ConfigError(f"{path}: its {file.size} bytes do not fit the {total} tokens that {path}.index names.")
    return ForeignTokens("a token file of datatrove", file.array(0, np.dtype(f"<u{size}"), total), ends)
