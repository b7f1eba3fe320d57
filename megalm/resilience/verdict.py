"""Who brought a group of ranks down: decided from how each process ended, what it said, and where it stood.

The first error that is seen is mostly a victim's: when a rank dies, its peers' connections break at once, and they raise
before anybody has noticed the death. So, in this order:

    1. a process that was ended by a signal, or by an exit without a word (os._exit, exit 0 before the end)
    2. a rank that raised what is no error of communication
    3. the rank that is furthest behind: the others wait for it
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalm.resilience.page import Position

_COMMUNICATION = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out waiting|wait timeout|timeout .*closure|gloo|nccl|"
    r"closed by peer|remote process exited",
    re.IGNORECASE,
)
_COMMUNICATION_TYPES = ("Dist", "ConnectionError", "ConnectionReset", "BrokenPipe", "TimeoutError")


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    rank: int
    exit: int | None
    """Exit code, negative for a signal; None: the process still ran when the group was stopped."""
    error: str | None
    """What it raised, `ValueError: ...`; None: it said nothing."""
    moment_ns: int
    """When that was seen."""
    frozen: bool = False
    """Its process showed no life."""

    def describe(self) -> str:
        """`was killed by signal 9 (SIGKILL)`"""
        if self.error is not None:
            return f"raised {self.error.splitlines()[0][:300]}"
        if self.exit is None:
            return "showed no life" if self.frozen else "stood still"
        if self.exit < 0:
            return f"was killed by {describe_exit(self.exit)}"
        return f"ended with {describe_exit(self.exit)} before the run's end"


def describe_exit(code: int | None) -> str | None:
    """`signal 9 (SIGKILL)`, `exit code 3`; None where the process still ran."""
    if code is None:
        return None
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def is_communication_error(error: str) -> bool:
    """True for what a rank raises because another one is gone, or does not come."""
    kind, _, text = error.partition(":")
    if kind.rpartition(".")[2].startswith(_COMMUNICATION_TYPES):
        return True
    return kind.strip() in ("RuntimeError", "OSError", "Exception") and bool(_COMMUNICATION.search(text))


def is_about_place(failure: Failure) -> bool:
    """True where the device may be at fault: its process ended or stood still, or the error is a device's and no program's."""
    return failure.error is None or failure.error.startswith("AcceleratorError") or "CUDA error" in failure.error


def find_culprit(failures: Sequence[Failure], positions: Mapping[int, Position]) -> Failure:
    """Choose the rank that the others are victims of. Errors: ValueError without any failure."""
    silent = [f for f in failures if f.error is None and f.exit is not None]
    if silent:
        return min(silent, key=lambda f: (f.exit == 1, f.moment_ns))
    own = [f for f in failures if f.error is not None and not is_communication_error(f.error)]
    if own:
        return min(own, key=lambda f: f.moment_ns)
    return min(failures, key=lambda f: (positions[f.rank].order, f.moment_ns))
