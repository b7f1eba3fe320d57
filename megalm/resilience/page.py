"""One page of memory that the ranks of a node and their supervisor share: who is alive, and where each rank stands.

A rank writes into its own row alone, the supervisor into the head; every value is one aligned 64-bit word, which no reader
sees half written. The memory has no name in the file system, so that nothing can be left behind, however everybody dies.

    head      signal
    row       alive, mark, phase, step, micro_batch, durable, status, marks, begun, longest[phase], count[phase]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, get_args

from megalm.train.pulse import Phase

PHASES: tuple[Phase, ...] = get_args(Phase)
NONE = -1
"""What a number is before anybody knew it."""

_FIELDS = ("alive", "mark", "phase", "step", "micro_batch", "durable", "status", "marks", "begun")
_PLACE = {name: place for place, name in enumerate(_FIELDS)}
_LONGEST = len(_FIELDS)
_COUNT = _LONGEST + len(PHASES)
_ROW = _COUNT + len(PHASES)
_HEAD = 8


@dataclass(frozen=True)
class Position:
    """Where a rank stands, as its row says."""

    alive_ns: int
    """When its thread last showed that the process runs (CLOCK_MONOTONIC)."""
    mark_ns: int
    """When its phase or micro-batch last changed."""
    phase: Phase
    step: int
    """Steps that it has completed, of those of the run; -1 before any state was loaded."""
    micro_batch: int
    durable: int
    """Step of the newest durable checkpoint that it knows of; -1: none."""
    status: int
    """Exit status that it ended with; -1: it has not."""
    begun: int = NONE
    """Step that it went on from; -1: it has not begun to train."""

    @property
    def trained(self) -> bool:
        """True where it has completed a step."""
        return self.step > self.begun >= 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts ranks by how far they are: who waits for the others comes last. Passes of one step count by micro-batch."""
        passes = self.phase in ("forward", "backward")
        rank = PHASES.index("forward") if passes else PHASES.index(self.phase)
        return (self.step, rank, self.micro_batch if passes else 0)

    def describe(self) -> str:
        """`backward of micro-batch 3 of step 12`"""
        if self.step < 0:
            return self.phase
        of = f" of micro-batch {self.micro_batch}" if self.phase in ("forward", "backward") else ""
        return f"{self.phase}{of} of step {self.step + (self.phase not in ('save', 'evaluate', 'end'))}"


class RunPage:
    """The shared page; hand it to processes of the same context as an argument."""

    def __init__(self, context: BaseContext, ranks: int) -> None:
        """ranks: the most that there are at once."""
        self.ranks = self.rows = ranks
        self._memory: Any = context.RawArray("q", _HEAD + ranks * _ROW)
        for rank in range(ranks):
            self.begin(rank)

    def resize(self, ranks: int) -> None:
        """So many ranks there are from now on; how long their phases take has to be learned anew."""
        if ranks != self.ranks:
            self.ranks = ranks
            for rank in range(self.rows):
                self.row(rank)[_LONGEST:] = memoryview(bytearray(8 * (_ROW - _LONGEST))).cast("q")

    def begin(self, rank: int) -> None:
        """Make a rank's row ready for a new process; what was learned of how long phases take stays."""
        row = self.row(rank)
        now = time.monotonic_ns()
        row[: len(_FIELDS)] = memoryview(bytearray(8 * len(_FIELDS))).cast("q")
        for name, value in (("alive", now), ("mark", now), ("step", NONE), ("durable", NONE), ("status", NONE),
                            ("begun", NONE)):  # fmt: skip
            row[_PLACE[name]] = value

    def row(self, rank: int) -> memoryview:
        """The words of one rank. Shapes: -> int64 [_ROW]"""
        first = _HEAD + rank * _ROW
        return memoryview(self._memory).cast("B").cast("q")[first : first + _ROW]

    def position(self, rank: int) -> Position:
        """Read where a rank stands."""
        row = self.row(rank)
        alive, mark, phase, step, micro, durable, status, _, begun = row[: len(_FIELDS)].tolist()
        return Position(alive, mark, PHASES[phase], step, micro, durable, status, begun)

    def positions(self) -> list[Position]:
        """Read where every rank stands."""
        return [self.position(rank) for rank in range(self.ranks)]

    def longest_s(self, phase: Phase) -> tuple[float, int]:
        """Give the longest time that any rank was at the phase, and how often ranks were."""
        place = PHASES.index(phase)
        rows = [self.row(rank) for rank in range(self.ranks)]
        return max(row[_LONGEST + place] for row in rows) / 1e9, sum(row[_COUNT + place] for row in rows)

    @property
    def signal(self) -> int:
        """Number of the signal that the supervisor was sent; 0: none."""
        return memoryview(self._memory).cast("B").cast("q")[0]

    @signal.setter
    def signal(self, number: int) -> None:
        memoryview(self._memory).cast("B").cast("q")[0] = number


def find_latest_step(positions: Sequence[Position]) -> int:
    """Give the last step that all these ranks know to be complete; -1 where none has begun."""
    return max((position.step for position in positions), default=NONE)


class Row:
    """A rank's own row, to write into."""

    def __init__(self, page: RunPage, rank: int) -> None:
        self.words = page.row(rank)

    def show_life(self) -> None:
        """Say that the process runs."""
        self.words[_PLACE["alive"]] = time.monotonic_ns()

    def mark(self, phase: int, micro_batch: int, *, learned: bool) -> None:
        """The rank is at another phase; `learned`: the time that the last one took counts for its limit."""
        words, now = self.words, time.monotonic_ns()
        before = words[2]
        if learned:
            took = now - words[1]
            if took > words[_LONGEST + before]:
                words[_LONGEST + before] = took
            words[_COUNT + before] += 1
        words[1] = now
        words[2] = phase
        words[4] = micro_batch
        words[7] += 1

    def set(self, name: str, value: int) -> None:
        """Write one of the row's named words."""
        self.words[_PLACE[name]] = value
