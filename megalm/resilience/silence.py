"""Who stands still: decided from how a rank's signs of life and of progress age, without processes, clock or files.

    frozen    its process shows no life: stopped, swapped out, or deep in a call that holds Python's lock
    hanging   its process lives, and none of the ranks gets on: the one that is furthest behind is waited for by the others

How long is too long belongs to a phase: a save may take minutes, a backward pass of a micro-batch not. It is learned from what
the phase took so far, over all ranks and attempts; a phase that nobody has been through is given the whole ceiling.
Time counts while whoever watches was awake himself: a machine that was suspended or swapped out all of it raises no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalm.resilience.page import Position
from megalm.train.pulse import Phase

FROZEN_S = 5.0
"""A process shows life five times a second; with all cores taken by others it still does every second."""
LEAST_S = 6.0
"""No phase counts as hanging sooner: a machine that is busy with something else for a while is no fault."""
MARGIN = 5.0
"""Times the longest that a phase took so far (nvidia-resiliency-ext's factor)."""
TAUGHT = 3
"""Times that a phase must have been seen before its length says anything."""


@dataclass(frozen=True)
class Silence:
    """A rank that stands still."""

    rank: int
    frozen: bool
    """It shows no life; else the run gets on nowhere, and this rank is furthest behind."""
    silent_s: float


class Limits:
    """How long a rank may be at a phase."""

    def __init__(self, longest_s: Callable[[Phase], tuple[float, int]], ceiling_s: float, fixed_s: float) -> None:
        """longest_s: the longest time that a phase took so far, and how often it was seen. fixed_s: for all; 0: learned."""
        self._longest_s, self._ceiling_s, self._fixed_s = longest_s, ceiling_s, fixed_s

    def of(self, phase: Phase) -> float:
        """Seconds."""
        if self._fixed_s:
            return self._fixed_s
        longest, seen = self._longest_s(phase)
        if seen < TAUGHT:
            return self._ceiling_s
        return min(self._ceiling_s, max(LEAST_S, MARGIN * longest))


class Watch:
    """Looks at the ranks again and again; remembers since when each of their marks has not changed."""

    def __init__(self, ranks: int, limits: Limits, longest_nap_s: float) -> None:
        """longest_nap_s: between two looks; what is longer, whoever looks was asleep himself."""
        self._limits, self._longest_nap_s = limits, longest_nap_s
        self._seen: list[tuple[int, int]] = [(0, 0)] * ranks
        self._silent: list[float] = [0.0] * ranks
        self._still: list[float] = [0.0] * ranks
        self._last: float | None = None

    def look(self, positions: Sequence[Position], now_s: float) -> Silence | None:
        """Tell of a rank that has stood still for too long; None: all get on, or may yet. Ranks that ended are left out."""
        passed = 0.0 if self._last is None else min(now_s - self._last, self._longest_nap_s)
        self._last = now_s
        for rank, position in enumerate(positions):
            alive, mark = self._seen[rank]
            self._silent[rank] = 0.0 if position.alive_ns != alive else self._silent[rank] + passed
            self._still[rank] = 0.0 if position.mark_ns != mark else self._still[rank] + passed
            self._seen[rank] = position.alive_ns, position.mark_ns
        working = [rank for rank, position in enumerate(positions) if position.status < 0]
        frozen = [rank for rank in working if self._silent[rank] > FROZEN_S and positions[rank].phase != "start"]
        if frozen:
            rank = max(frozen, key=lambda rank: self._silent[rank])
            return Silence(rank, True, self._silent[rank])
        if working and all(self._is_late(rank, positions[rank]) for rank in working):
            rank = min(working, key=lambda rank: (positions[rank].order, -self._still[rank]))
            return Silence(rank, False, self._still[rank])
        return None

    def _is_late(self, rank: int, position: Position) -> bool:
        return self._still[rank] > self._limits.of(position.phase)
