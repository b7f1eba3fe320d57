"""Suffix arrays, and windows that occur more than once, in C++ (csrc/suffix), or in numpy where that was not built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@cache
def load_native() -> ModuleType | None:
    """`megalm._C` without torch, which the data tools do not load; None where it was not built."""
    try:
        from megalm import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _C if hasattr(_C, "word_shingles") and hasattr(_C, "minhash") else None


def _symbols(text: np.ndarray) -> np.ndarray:
    """Bytes and tokens are not negative: signed ones are seen as unsigned."""
    return np.ascontiguousarray(text).view(_UNSIGNED[text.dtype.itemsize])


def build_suffix_array(text: np.ndarray) -> np.ndarray:
    """Build the places of the suffixes in their order; one that is the beginning of another comes first.

    Memory: text, result, 1 byte a symbol, and 8 bytes for each value up to the largest one.
    Shapes: integers of 1, 2 or 4 bytes [N] -> int32 [N], from 2^31 symbols on int64 [N]
    """
    symbols = _symbols(text)
    library = load_native()
    if library is None or len(text) == 0:
        return _suffix_array(symbols)
    out = np.empty(len(text), np.int32 if len(text) < 2**31 else np.int64)
    ok = library.suffix_array(
        symbols.ctypes.data,
        symbols.itemsize,
        len(symbols),
        int(symbols.max()) + 1,
        out.ctypes.data,
        out.itemsize,
    )
    if not ok:
        raise MemoryError(f"no memory for the suffix array of {len(text)} symbols")
    return out


def _suffix_array(symbols: np.ndarray) -> np.ndarray:
    """By doubling: ranks by the first 2k symbols from ranks by the first k."""
    rank = np.unique(symbols, return_inverse=True)[1].astype(np.int64) + 1
    order = np.argsort(rank, kind="stable")
    width = 1
    while len(rank) and int(rank.max()) < len(rank):
        behind = np.zeros_like(rank)
        behind[: max(len(rank) - width, 0)] = rank[width:]
        order = np.lexsort((behind, rank))
        new = (np.diff(rank[order], prepend=-1) != 0) | (np.diff(behind[order], prepend=-1) != 0)
        rank = np.empty_like(rank)
        rank[order] = np.cumsum(new)
        width *= 2
    return order.astype(np.int32)


def find_repeats(text: np.ndarray, length: int, lists: Sequence[np.ndarray], bases: Sequence[int]) -> np.ndarray:
    """Windows of `length` symbols that occur again, without an overlap with the first place: (place, first place).

    Each list holds places relative to its base, sorted by the window there; together they are merged.

    Memory: 16 bytes a place.
    Shapes: text [N], lists uint32 [...] -> int64 [repeats, 2], the repeats of one window together
    """
    symbols = text.view(_UNSIGNED[text.dtype.itemsize])
    library = load_native()
    if library is None:
        return _repeats(symbols, length, lists, bases)
    own = [np.ascontiguousarray(places, np.uint32) for places in lists]
    addresses = np.array([places.ctypes.data for places in own], np.uint64)
    counts = np.array([len(places) for places in own], np.int64)
    offsets = np.array(bases, np.int64)
    out = np.empty((int(counts.sum()), 2), np.int64)
    found = library.repeats(
        symbols.ctypes.data,
        symbols.itemsize,
        length,
        len(own),
        addresses.ctypes.data,
        counts.ctypes.data,
        offsets.ctypes.data,
        out.ctypes.data,
    )
    if found < 0:
        raise MemoryError(f"no memory to merge {len(own)} lists")
    return out[:found].copy()


def _repeats(symbols: np.ndarray, length: int, lists: Sequence[np.ndarray], bases: Sequence[int]) -> np.ndarray:
    groups: dict[bytes, list[int]] = {}
    for places, base in zip(lists, bases, strict=True):
        for place in places.tolist():
            groups.setdefault(symbols[base + place : base + place + length].tobytes(), []).append(base + place)
    pairs = []
    for group in groups.values():
        first = min(group)
        pairs += [(place, first) for place in group if place >= first + length]
    return np.array(pairs, np.int64).reshape(-1, 2)
