"""Faults of processes, at a chosen phase of a run: the rank that comes to it dies, stops, raises or waits for ever.

They strike through the pulse, the calls by which the trainer says where it stands; so each phase that is watched is one
that can be struck, and a run without faults has nothing of this in it.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

from megalm.config.chaos import ChaosConfig, FaultConfig
from megalm.resilience.page import NONE
from megalm.train.pulse import Phase, Pulse

log = logging.getLogger("megalm.chaos")

BEFORE_STEPS: tuple[Phase, ...] = ("start", "join", "load")
LEFT_BYTES = 64 << 20
"""What a rank that runs out of memory may still take, to say so."""


class ChaosError(RuntimeError):
    """An error on purpose."""


@dataclass(frozen=True)
class Occasion:
    """What of the run decides which faults strike."""

    attempt: int = 0
    furthest: int = NONE
    """Last step that any attempt has completed."""


def add_faults(
    pulse: Pulse, chaos: ChaosConfig, rank: int, world_size: int, occasion: Occasion, place: int = NONE
) -> Pulse:
    """The pulse, through which this rank's faults of this attempt strike; the pulse itself where it has none.

    place: of the machine, where the rank stands; -1: its number.
    """
    place, attempt = (rank if place < 0 else place), occasion.attempt
    if chaos.mean_s:
        draw = random.Random(f"{chaos.seed} {attempt}")
        fault, victim, after_s = (
            draw.choice(chaos.faults),
            draw.randrange(world_size),
            draw.expovariate(1 / chaos.mean_s),
        )
        return FaultyPulse(pulse, [fault], rank, after_s=after_s) if victim == rank else pulse
    own = [
        fault
        for fault in chaos.faults
        if fault.rank == place
        and (not has_struck(fault, occasion) if fault.kind == "lose" else attempt < fault.attempts)
    ]
    if is_lost(chaos, place, occasion.furthest, attempt):
        own.insert(0, FaultConfig("kill", "start"))
    return FaultyPulse(pulse, own, rank) if own else pulse


def has_struck(fault: FaultConfig, occasion: Occasion) -> bool:
    """True where a fault that strikes once in the run did so in an attempt before this one."""
    before = fault.phase in BEFORE_STEPS or occasion.furthest >= fault.step - 1
    return occasion.attempt > 0 and before


def is_lost(chaos: ChaosConfig, place: int, furthest: int, attempt: int = 1) -> bool:
    """True where nothing that is started in this place works, as the run stands."""
    return any(
        fault.kind == "lose" and fault.rank == place and not chaos.mean_s and has_struck(fault, Occasion(attempt, furthest))
        and (fault.until == 0 or furthest < fault.until)
        for fault in chaos.faults
    )  # fmt: skip


def find_attempt(environment: Mapping[str, str]) -> int:
    """Find how often torchrun or Slurm has started the ranks again."""
    text = environment.get("TORCHELASTIC_RESTART_COUNT") or environment.get("SLURM_RESTART_COUNT") or "0"
    return int(text) if text.isdecimal() else 0


class FaultyPulse(Pulse):
    """Another pulse; strikes when the rank comes to where a fault is due.

    Args:
        after_s: seconds of this process before which nothing strikes; None: the faults' steps decide.
    """

    def __init__(self, pulse: Pulse, faults: list[FaultConfig], rank: int, *, after_s: float | None = None) -> None:
        self.pulse, self.faults, self.rank = pulse, list(faults), rank
        self._due_s = None if after_s is None else time.monotonic() + after_s
        self._under_way = 0

    def enter(self, phase: Phase) -> None:
        self.pulse.enter(phase)
        self._come(phase)

    def begin_micro_batch(self, phase: Phase, number: int) -> None:
        self.pulse.begin_micro_batch(phase, number)
        self._come(phase)

    def complete_step(self, step: int, durable: int | None) -> None:
        self._under_way = step + 1
        self.pulse.complete_step(step, durable)

    def finish(self, status: int) -> None:
        self.pulse.enter("end")
        self._come("end")
        self.pulse.finish(status)

    def fail(self, error: BaseException) -> None:
        self.pulse.fail(error)

    def _come(self, phase: Phase) -> None:
        for fault in self.faults:
            if fault.phase == phase and self._is_due(fault):
                self.faults.remove(fault)
                what = f"chaos: rank {self.rank}, {phase} of step {self._under_way}: {fault.kind}"
                log.warning(what)
                print(what, file=sys.stderr, flush=True)
                strike(fault.kind)
                return

    def _is_due(self, fault: FaultConfig) -> bool:
        if self._due_s is not None:
            return time.monotonic() >= self._due_s
        return fault.phase in BEFORE_STEPS or self._under_way >= fault.step


def strike(kind: str) -> None:
    """Do to this process what a fault of this kind does. Errors: ChaosError, MemoryError, where that is the fault."""
    if kind in ("kill", "lose"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exception":
        raise ChaosError("an error on purpose")
    elif kind == "exit":
        os._exit(0)
    elif kind == "out_of_memory":
        _run_out_of_memory()
    elif kind == "hang":
        while True:
            time.sleep(3600)
    elif kind == "kill_launcher":
        parent = parent_process()
        os.kill(os.getppid() if parent is None or parent.pid is None else parent.pid, signal.SIGKILL)
    else:
        raise ValueError(f"no fault is called {kind!r}")


def _run_out_of_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LEFT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    bytearray(2 * LEFT_BYTES)
