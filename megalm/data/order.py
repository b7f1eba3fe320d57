"""Which sample is seen when: pure functions of (seed, sources, position), with nothing to build and nothing to store.

Inside a source, epoch e visits its samples in the order of a keyed permutation: a Feistel network over the smallest
power of two that holds them, walked until it lands inside (cycle walking; Black and Rogaway 2002). Between sources,
`megalm.data.blend` deals the stream. So position -> (source, sample, epoch) is arithmetic, for any position, at any size
of the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.blend import make_blend
from megalm.data.mixing import mix
from megalm.data.native import load_library

ROUNDS = 4  # pairs of Feistel rounds; three make a pseudorandom permutation in theory, the fourth is margin
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """A 64-bit key from anything printable; the same on every machine."""
    return int.from_bytes(
        hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )


def permute(index: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """A permutation of [0, size) chosen by `key`, applied to each index.

    Shapes:  index [N] integers in [0, size); key one number or uint64 [N] -> int64 [N]
    """
    index = np.asarray(index)
    if size < 1:
        raise ValueError("size must be at least 1")
    bits = max(2, (size - 1).bit_length())
    right_bits = np.uint64(bits // 2)
    right_mask = np.uint64((1 << (bits // 2)) - 1)
    left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    values = out
    while len(todo):
        left, right = values >> right_bits, values & right_mask
        for round_index in range(ROUNDS):
            constant = np.uint64((2 * round_index + 1) * _GOLDEN & _MASK64)
            left = left ^ (mix(right + (keys ^ constant)) & left_mask)
            constant = np.uint64((2 * round_index + 2) * _GOLDEN & _MASK64)
            right = right ^ (mix(left + (keys ^ constant)) & right_mask)
        values = (left << right_bits) | right
        out[todo] = values
        outside = values >= np.uint64(size)
        todo, values, keys = todo[outside], values[outside], keys[outside]
    return out.astype(np.int64)


def shuffle_indices(index: np.ndarray, size: int, keys: np.ndarray, window: int) -> np.ndarray:
    """Shapes: index int64 [N] in [0, size), keys uint64 [N] -> int64 [N]"""
    if not 0 < window < size:
        return _permute(index, size, keys)
    whole = size // window * window  # the rest, less than a window, comes last
    out = np.empty_like(index)
    inside, rest = index < whole, index >= whole
    stretch, at = np.divmod(index[inside], window)
    stretch = _permute(stretch, whole // window, keys[inside])
    own = mix(keys[inside] ^ (stretch.astype(np.uint64) + np.uint64(1)) * _MIX1)
    out[inside] = stretch * window + _permute(at, window, own)
    if rest.any():
        out[rest] = whole + _permute(index[rest] - whole, size - whole, mix(keys[rest]))
    return out


def _permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """`permute` by the compiled extension where there is one: the same numbers, about 20 times as fast."""
    native = load_library()
    if native is None:
        return permute(index, size, keys)
    index, out = np.ascontiguousarray(index, np.int64), np.empty(len(index), np.int64)
    native.permute(size, len(index), False, index.ctypes.data, keys.ctypes.data, out.ctypes.data)
    return out


@dataclass(frozen=True)
class Source:
    """One data set in the mixture: its name (which keys its order), its samples in one epoch, its weight."""

    name: str
    samples: int
    weight: float


@dataclass(frozen=True)
class Samples:
    """Shapes: all int64 [N]. `index` counts inside the source's epoch, after the permutation, in samples that are
    `parts` times shorter than the source's own.
    """

    source: np.ndarray
    index: np.ndarray
    epoch: np.ndarray
    parts: np.ndarray | int = 1


def sample_ids(
    sources: Sequence[Source], seed: int, position: np.ndarray, *, shuffle: bool = True, blend: str = "chairman"
) -> Samples:
    """The samples at these positions of the stream: a pure function, the same for every layout and every restart.

    Shapes:  position int64 [N], any positions in any order -> Samples of [N]
    """
    check_sources(sources)
    return resolve(sources, seed, *make_blend(blend, [s.weight for s in sources]).assign(position), shuffle=shuffle)


def check_sources(sources: Sequence[Source]) -> None:
    """Errors: ConfigError for a name given twice, or a source with weight but without a single whole sample."""
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(
            f"data source {twice[0]!r} is given twice: name each data set once and set its weight instead."
        )
    for source in sources:
        if source.samples < 1 and source.weight > 0:
            raise ConfigError(
                f"data source {source.name!r} holds less than one sample: its tokens are fewer than model.seq_length "
                f"+ 1. "
                "Give it more text, a shorter sequence, or the weight 0."
            )


def resolve(
    sources: Sequence[Source],
    seed: int,
    source: np.ndarray,
    rank: np.ndarray,
    *,
    shuffle: bool = True,
    window: int = 0,
) -> Samples:
    """From (source, how many of it came before) to the sample inside the source and its epoch.

    window: samples that are neighbours in the source stay together in stretches of so many, which come in random order and
    are each in random order; 0: the whole source is shuffled.
    """
    index, epoch = np.empty(len(source), np.int64), np.empty(len(source), np.int64)
    for number, item in enumerate(sources):
        where = np.nonzero(source == number)[0]
        if len(where) == 0:
            continue
        epoch[where], inside = np.divmod(rank[where], item.samples)
        if shuffle:
            base = np.uint64(derive_key(seed, item.name))
            keys = mix(base + epoch[where].astype(np.uint64) * np.uint64(_GOLDEN))
            inside = shuffle_indices(inside, item.samples, keys, window)
        index[where] = inside
    return Samples(source, index, epoch)
