"""Where a rank stands in its run, for whoever watches it from outside."""

from typing import Literal

Phase = Literal[
    "start", "join", "load", "data", "forward", "backward", "reduce", "update", "save", "evaluate", "end"
]  # fmt: skip
"""What a rank is at, in the order of a run's life; from data to evaluate they come again at each step."""


class Pulse:
    """Told at every change of phase; does nothing by itself. A rank that is watched has `megalm.resilience.pulse`."""

    def enter(self, phase: Phase) -> None:
        """The rank is at this phase from now on."""

    def begin_micro_batch(self, phase: Phase, number: int) -> None:
        """The rank is at a pass of this micro-batch."""

    def complete_step(self, step: int, durable: int | None) -> None:
        """The run stands after this step (or goes on from it); `durable` is the step of its newest durable checkpoint."""

    def finish(self, status: int) -> None:
        """Training is over, all is saved, and this is the exit status: what follows only tidies up."""

    def fail(self, error: BaseException) -> None:
        """The rank cannot go on; told before it tidies up, which may take long where a peer is gone."""
