"""How the stream is dealt to its sources, so that each has its share in every prefix and every window.

`Chairman` is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): with n sources, of
every prefix each source holds its exact share within 1 - 1/(2n-2) of a sample, and no order can promise less for all
shares. A window is the difference of two prefixes: within 2 - 1/(n-1), so within one for two sources.

    sample k of a source with share p:  not before slot ceil((k + d) / p),  not after floor((k + 1 - d) / p) + 1,
    with d = 1/(2n-2);  each slot takes, of those that may come, the one that must come first.

Shares are multiples of 2^-30, so the order begins anew after 2^30 slots. How many of each source came before any slot is
worked out from the slots since the oldest sample that is still open there, at most about one over the smallest share.
Sources with less than one sample in a million are therefore dealt apart, by `Tree`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.native import load_library

SHARE_BITS = 30  # a share is a multiple of 2^-30: one sample in a billion
UNIT = 1 << SHARE_BITS
RARE = 1 << (SHARE_BITS - 20)  # smaller shares than one in a million are dealt apart
NEAR = 1 << 16  # slots: going on from a known one costs less than working out how many came before


class Blend(Protocol):
    """Positions of the stream to sources."""

    def assign(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shapes: position int64 [N] -> source int64 [N], and how many samples of that source came before [N]."""

    def counts(self, position: int) -> np.ndarray:
        """Samples of each source among the first `position` of the stream. Shapes: -> int64 [sources]"""


def make_blend(kind: str, weights: Sequence[float]) -> Blend:
    """`chairman`, or `tree` for streams that were begun with it.

    Errors: ConfigError for weights that are no mixture, or another kind.
    """
    kinds: dict[str, Callable[[Sequence[float]], Blend]] = {"chairman": Chairman, "tree": Tree}
    if kind not in kinds:
        raise ConfigError(
            f"the checkpoint's data was dealt by {kind!r}, which this version does not know: it knows "
            f"{', '.join(kinds)}. Use the version that wrote the checkpoint."
        )
    return kinds[kind](weights)


def _checked(weights: Sequence[float]) -> list[float]:
    weights = [float(weight) for weight in weights]
    if not weights or any(not np.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
        raise ConfigError(
            f"data.weights is {weights}: give one finite number >= 0 for each source, at least one of them above 0."
        )
    return weights


def round_shares(weights: Sequence[float]) -> np.ndarray:
    """Shares in units of 2^-30 that sum to 1: the nearest, by largest remainder; none that was positive becomes 0.

    Shapes: -> int64 [sources]
    """
    total = float(sum(weights))
    exact = [weight / total * UNIT for weight in weights]
    shares = np.array([max(1, int(value)) if value > 0 else 0 for value in exact], np.int64)
    remainders = [value - share for value, share in zip(exact, shares.tolist(), strict=True)]
    order = sorted(range(len(exact)), key=lambda i: (-remainders[i], i))
    missing = UNIT - int(shares.sum())
    for i in order[: max(0, missing)]:
        shares[i] += 1
    if missing < 0:  # more was given to tiny sources than the remainders hold: the largest pays
        shares[int(np.argmax(shares))] += missing
    return shares


class Chairman:
    """Every prefix within 1 - 1/(2n-2) of each source's share, which is the best possible.

    Sources below a millionth come through a tree of their own; beside them the others' bound grows by half a share.
    """

    def __init__(self, weights: Sequence[float]):
        weights = _checked(weights)
        self.size = len(weights)
        shares = round_shares(weights)
        self._common = np.flatnonzero(shares >= RARE)
        self._rare = np.flatnonzero((shares > 0) & (shares < RARE))
        self._common_share = int(shares[self._common].sum())
        self._tree = Tree([weights[i] for i in self._rare]) if len(self._rare) else None
        if len(self._common):
            self._shares = round_shares([weights[i] for i in self._common])
            number = len(self._common)
            self._slack = UNIT // (2 * number - 2) if number > 1 else 0
        self._known = (0, np.zeros(len(self._common), np.int64))  # a slot and how many of each came before it

    def assign(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shapes: position int64 [N] -> source int64 [N], and how many samples of that source came before [N]."""
        position = np.asarray(position, np.int64)
        if self._tree is None:
            return self._assign_common(position)
        if not len(self._common):
            source, rank = self._tree.assign(position)
            return self._rare[source], rank
        before = _left_count(position, self._common_share)
        common = _left_count(position + 1, self._common_share) > before
        source, rank = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        source[common], rank[common] = self._assign_common(before[common])
        number, rank[~common] = self._tree.assign((position - before)[~common])
        source[~common] = self._rare[number]
        return source, rank

    def counts(self, position: int) -> np.ndarray:
        """Samples of each source among the first `position` of the stream. Shapes: -> int64 [sources]"""
        counts = np.zeros(self.size, np.int64)
        common = position
        if self._tree is not None:
            common = int(_left_count(np.array([position]), self._common_share)[0]) if len(self._common) else 0
            counts[self._rare] = self._tree.counts(position - common)
        if len(self._common):
            period, slot = divmod(common, UNIT)
            counts[self._common] = period * self._shares + self._before(slot)
        return counts

    def _assign_common(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self._common) == 1:
            return np.full(len(position), self._common[0]), position.copy()
        if len(position) and position[-1] - position[0] == len(position) - 1 and (np.diff(position) == 1).all():
            return self._run(int(position[0]), len(position))
        wanted, inverse = np.unique(position, return_inverse=True)
        source, rank = np.empty(len(wanted), np.int64), np.empty(len(wanted), np.int64)
        for part in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) > NEAR) + 1):
            if len(part):
                first = int(wanted[part[0]])
                run = self._run(first, int(wanted[part[-1]]) - first + 1)
                source[part], rank[part] = (values[wanted[part] - first] for values in run)
        return source[inverse], rank[inverse]

    def _run(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Consecutive positions."""
        source, rank = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            period, slot = divmod(first + done, UNIT)
            number = min(count - done, UNIT - slot)
            known, given = self._known
            if not 0 <= first + done - known <= NEAR or known // UNIT != period:
                known, given = first + done, self._before(slot)
            lead = first + done - known
            given = given.copy()
            found = np.empty((2, lead + number), np.int64)
            _deal(self._shares, self._slack, known % UNIT, given, found)
            source[done : done + number] = self._common[found[0, lead:]]
            rank[done : done + number] = found[1, lead:] + period * self._shares[found[0, lead:]]
            done += number
            end = first + done
            self._known = (end, given if end % UNIT else np.zeros_like(given))
        return source, rank

    def _before(self, slot: int) -> np.ndarray:
        if len(self._common) == 1:
            return np.array([slot], np.int64)
        return _dealt(self._shares, self._slack, slot)


def _deal(shares: np.ndarray, slack: int, first: int, given: np.ndarray, found: np.ndarray) -> None:
    """Deals slots first + 1, ...; `given` goes on from before the first to after the last.

    Shapes: shares, given int64 [n]; found int64 [2, N], filled with sources and how many of each came before
    """
    native = load_library()
    if native is not None:
        native.deal(
            len(shares), UNIT, slack, first, found.shape[1],
            shares.ctypes.data, given.ctypes.data, found[0].ctypes.data, found[1].ctypes.data,
        )  # fmt: skip
        return
    waiting: list[tuple[int, int, int]] = []  # (release, deadline, source)
    ready: list[tuple[int, int]] = []  # (deadline, source)
    share, count = shares.tolist(), given.tolist()

    def follow(i: int) -> None:
        release = -(-(count[i] * UNIT + slack) // share[i])
        heapq.heappush(waiting, (release, ((count[i] + 1) * UNIT - slack) // share[i] + 1, i))

    for i in range(len(share)):
        follow(i)
    for j in range(found.shape[1]):
        while waiting and waiting[0][0] <= first + 1 + j:
            heapq.heappush(ready, heapq.heappop(waiting)[1:])
        best = heapq.heappop(ready)[1]
        found[:, j] = best, count[best]
        count[best] += 1
        follow(best)
    given[:] = count


def _dealt(shares: np.ndarray, slack: int, slots: int) -> np.ndarray:
    """How many of each source the first `slots` slots hold, without dealing them.

    A sample is open after t slots if it may have come and need not have; of a source there is one at most. Of the
    certain ones and those of the j earliest deadlines, min over s <= t of (released by s) + t - s have come, as in a
    queue that always serves the earliest deadline; before the first release of an open one that is t.

    Shapes: shares int64 [n] -> int64 [n]
    """
    given = np.empty(len(shares), np.int64)
    native = load_library()
    if native is not None:
        native.dealt(len(shares), UNIT, slack, slots, shares.ctypes.data, given.ctypes.data)
        return given
    given[:] = (slots * shares + slack - 1) // UNIT
    certain = int(given.sum())
    release = -(-(given * UNIT + slack) // shares)
    deadline = ((given + 1) * UNIT - slack) // shares + 1
    opened = np.flatnonzero(release <= slots)
    opened = opened[np.argsort(deadline[opened], kind="stable")]
    if slots == certain:
        return given
    starts = np.unique(release[opened])
    lowest = np.full(len(starts), np.iinfo(np.int64).max)
    for low in range(int(starts[0]), slots + 1, NEAR):
        slot = np.arange(low, min(low + NEAR, slots + 1))
        surplus = -slot
        for share in shares.tolist():
            surplus += (slot * share - slack) // UNIT + 1
        np.minimum.at(lowest, np.searchsorted(starts, slot, side="right") - 1, surplus)
    before = certain
    for j, source in enumerate(opened):
        later = (release[opened[j + 1 :]][None, :] <= starts[:, None]).sum(axis=1)
        come = slots + min(0, int((lowest - later).min()))
        given[source] += come - before
        before = come
    return given


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
        share = min(max(round(heavy / (heavy + light) * UNIT), 1), UNIT - 1)
        heapq.heappush(heap, (heavy + light, ticket, _Split(share, left, right)))
        ticket += 1
    return heap[0][2]


def _left_count(position: np.ndarray, share: int) -> np.ndarray:
    """floor(share * position + 1/2) without overflow: the high part of the position divides out exactly."""
    high, low = position >> SHARE_BITS, position & (UNIT - 1)
    return high * share + ((low * share + (UNIT >> 1)) >> SHARE_BITS)


class Tree:
    """A balanced tree of two-way splits: at each node the left side has floor(share * t + 1/2) of the first t samples.

    Closed form at any position and any share. Two sources: every window within one sample; more: prefixes within about
    1.5, windows within about 2.5. Evaluation draws by it, and so do runs that were begun with it.
    """

    def __init__(self, weights: Sequence[float]):
        weights = _checked(weights)
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
