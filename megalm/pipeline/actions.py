"""The vocabulary of pipeline schedules: what a rank can do, and where the stages are. No torch."""

from enum import StrEnum
from typing import NamedTuple


class ScheduleError(Exception):
    """A schedule that is incomplete, out of order, or cannot finish."""


class Kind(StrEnum):
    """What one action does."""

    F = "F"
    """forward"""
    B = "B"
    """full backward: gradients of the input and of the weights"""
    I = "I"  # noqa: E741  (the literature's letter)
    """input-gradient half of backward"""
    W = "W"
    """weight-gradient half of backward"""
    SEND_ACTIVATION = "SA"
    """this chunk's output, to the next stage"""
    RECEIVE_ACTIVATION = "RA"
    """this chunk's input, from the previous stage"""
    SEND_GRADIENT = "SG"
    """gradient of this chunk's input, to the previous stage"""
    RECEIVE_GRADIENT = "RG"
    """gradient of this chunk's output, from the next stage"""

    # Enum's own hash runs in Python; schedules of hundreds of ranks are looked up millions of times
    __hash__ = str.__hash__

    @property
    def is_communication(self) -> bool:
        """Whether this sends or receives."""
        return self in _COMMUNICATION


_COMMUNICATION = frozenset(kind for kind in Kind if len(kind) == 2)


class Action(NamedTuple):
    """One thing a rank does: `kind`, for one micro-batch, on one of its own chunks."""

    kind: Kind
    micro_batch: int
    chunk: int


class Placement(NamedTuple):
    """Which stage each rank's chunks are.

    loop: chunk c of rank r is stage c * ranks + r.
    v:    odd chunks run the other way, so that the first and the last stage of two chunks share rank 0.
    """

    ranks: int
    chunks: int = 1
    shape: str = "loop"

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that chunk `chunk` of rank `rank` is."""
        turned = self.shape == "v" and chunk % 2 == 1
        return chunk * self.ranks + (self.ranks - 1 - rank if turned else rank)

    def rank(self, stage: int) -> int:
        """The rank that holds a stage."""
        chunk, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.shape == "v" and chunk % 2 == 1 else place

    def chunk(self, stage: int) -> int:
        """The index, among its rank's chunks, of a stage."""
        return stage // self.ranks

    def of_rank(self, rank: int) -> list[int]:
        """The stages of a rank, by chunk."""
        return [self.stage(rank, chunk) for chunk in range(self.chunks)]


def describe(action: Action) -> str:
    """Describe an action in words."""
    return f"{action.kind.value} of micro-batch {action.micro_batch} on its chunk {action.chunk}"
