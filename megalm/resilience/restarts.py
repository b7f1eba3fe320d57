"""Whether a run that lost a rank is started again, and when: a decision without processes, clock or files."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.resilience.verdict import Failure, is_communication_error

BACKOFF_S = (0.0, 1.0, 2.0, 4.0)
"""Waits before the first, second, ... restart without progress: what passes by itself is given time, what does not costs
little."""


@dataclass(frozen=True)
class Answer:
    """Start again after `wait_s`, or (`reason`) give up."""

    wait_s: float = 0.0
    reason: str | None = None


class RestartPolicy:
    """Keeps the books of a run's restarts.

    Args:
        most: restarts in a row without a new durable step.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.spent = 0
        """Restarts since the last new durable step."""
        self.durable: int | None = None
        self._raised: set[tuple[int, str, str]] = set()
        """(rank, what it was at, error) of each exception that a restart did not see through yet."""

    def answer(self, failure: Failure, where: str, durable: int) -> Answer:
        """Decide after a failure. where: what the rank was at, step and all; durable: step of the newest checkpoint, -1: none."""
        if self.durable is not None and durable > self.durable:
            self.spent = 0
        self.durable = max(durable, self.durable if self.durable is not None else durable)
        if failure.error is not None and not is_communication_error(failure.error):
            key = (failure.rank, where, failure.error)
            if key in self._raised:
                return Answer(reason=f"rank {failure.rank} {failure.describe()}, in {where} for the second time: "
                                     "a restart does not help")  # fmt: skip
            self._raised.add(key)
        if self.spent >= self.most:
            return Answer(reason=self._exhausted(failure))
        wait = BACKOFF_S[min(self.spent, len(BACKOFF_S) - 1)]
        self.spent += 1
        return Answer(wait)

    def _exhausted(self, failure: Failure) -> str:
        last = f"rank {failure.rank} {failure.describe()}"
        if self.most == 0:
            return f"{last}, and resilience.max_restarts=0 allows no restart"
        return f"{last}, after {self.spent} restarts without a new durable step (resilience.max_restarts={self.most})"
