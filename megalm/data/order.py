"""Which sample is seen when: pure functions of (seed, sources, position), with nothing to build and nothing to store.

Inside a source, epoch e visits its samples in the order of a keyed permutation: a Feistel network over the smallest
power of two that holds them, walked until it lands inside (cycle walking; Black and Rogaway 2002). Between sources,
a balanced tree of two-way splits deals the stream: at each node the left side has received floor(share * t + 1/2) of
the first t samples, in exact integer arithmetic. So position -> (source, sample, epoch) is arithmetic, for any
position, at any size of the corpus.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.config.errors import ConfigError

SHARE_BITS = 30  # a split's share is a multiple of 2^-30: one sample in a billion
ROUNDS = 4  # pairs of Feistel rounds; three make a pseudorandom permutation in theory, the fourth is margin
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64 (Steele et al. 2014)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """A 64-bit key from anything printable; the same on every machine."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function: neighbouring inputs get unrelated outputs. Shapes: uint64 -> uint64"""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


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


@dataclass(frozen=True)
class Source:
    """One data set in the mixture: its name (which keys its order), its samples in one epoch, its weight."""

    name: str
    samples: int
    weight: float


@dataclass(frozen=True)
class _Split:
    share: int  # of the left side, in units of 2^-SHARE_BITS
    left: _Split | int
    right: _Split | int


def _build_tree(weights: Sequence[float]) -> _Split | int:
    """Huffman's tree: the errors of nested splits stay small where a heavy side is a leaf."""
    heap: list[tuple[float, int, _Split | int]] = [(weight, i, i) for i, weight in enumerate(weights) if weight > 0]
    heapq.heapify(heap)
    ticket = len(weights)
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        share = min(max(round(heavy / (heavy + light) * (1 << SHARE_BITS)), 1), (1 << SHARE_BITS) - 1)
        heapq.heappush(heap, (heavy + light, ticket, _Split(share, left, right)))
        ticket += 1
    return heap[0][2]


def _left_count(position: np.ndarray, share: int) -> np.ndarray:
    """floor(share * position + 1/2) without overflow: the high part of the position divides out exactly."""
    high, low = position >> SHARE_BITS, position & ((1 << SHARE_BITS) - 1)
    return high * share + ((low * share + (1 << (SHARE_BITS - 1))) >> SHARE_BITS)


class Mixture:
    """Deals positions of the stream to sources so that each has its share in every window.

    Any window holds each source within one sample of its share for two sources; for more, where that is impossible
    for most weights, within two at worst and within one for nearly all windows (the tests measure it).
    """

    def __init__(self, weights: Sequence[float]):
        weights = [float(weight) for weight in weights]
        if not weights or any(not np.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
            raise ConfigError(
                f"data.weights is {weights}: give one finite number >= 0 for each source, at least one of them above 0."
            )
        self.size = len(weights)
        self._tree = _build_tree(weights)

    def assign(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shapes: position int64 [N] -> source int64 [N], and how many samples of that source came before [N]."""
        position = np.asarray(position, dtype=np.int64)
        source, rank = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        stack = [(self._tree, np.arange(len(position)), position)]
        while stack:
            node, where, at = stack.pop()
            if len(where) == 0:
                continue
            if isinstance(node, int):
                source[where], rank[where] = node, at
                continue
            before = _left_count(at, node.share)
            left = _left_count(at + 1, node.share) > before
            stack.append((node.left, where[left], before[left]))
            stack.append((node.right, where[~left], (at - before)[~left]))
        return source, rank

    def counts(self, position: int) -> np.ndarray:
        """Samples of each source among the first `position` of the stream. Shapes: -> int64 [sources]"""
        counts = np.zeros(self.size, np.int64)
        stack = [(self._tree, np.array([position], np.int64))]
        while stack:
            node, at = stack.pop()
            if isinstance(node, int):
                counts[node] = at[0]
            else:
                left = _left_count(at, node.share)
                stack += [(node.left, left), (node.right, at - left)]
        return counts


@dataclass(frozen=True)
class Samples:
    """Shapes: all int64 [N]. `index` counts inside the source's epoch, after the permutation."""

    source: np.ndarray
    index: np.ndarray
    epoch: np.ndarray


def sample_ids(sources: Sequence[Source], seed: int, position: np.ndarray, *, shuffle: bool = True) -> Samples:
    """The samples at these positions of the stream: a pure function, the same for every layout and every restart.

    Shapes:  position int64 [N], any positions in any order -> Samples of [N]
    """
    check_sources(sources)
    return resolve(sources, seed, *Mixture([s.weight for s in sources]).assign(position), shuffle=shuffle)


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
    sources: Sequence[Source], seed: int, source: np.ndarray, rank: np.ndarray, *, shuffle: bool = True
) -> Samples:
    """From (source, how many of it came before) to the sample inside the source and its epoch."""
    index, epoch = np.empty(len(source), np.int64), np.empty(len(source), np.int64)
    for number, item in enumerate(sources):
        where = np.nonzero(source == number)[0]
        if len(where) == 0:
            continue
        epoch[where], inside = np.divmod(rank[where], item.samples)
        if shuffle:
            base = np.uint64(derive_key(seed, item.name))
            keys = mix(base + epoch[where].astype(np.uint64) * np.uint64(_GOLDEN))
            inside = permute(inside, item.samples, keys)
        index[where] = inside
    return Samples(source, index, epoch)
