"""What the supervisor tells the ranks that it starts again, and how they write it down."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megalm.resilience.pulse import RankPulse
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


@dataclass(frozen=True)
class Restart:
    """Why and when the ranks were started again; moments are of CLOCK_MONOTONIC, in ns, which all processes share."""

    attempt: int
    """1 for the first restart of this launcher."""
    reason: str
    last_step: int
    """Last step that was complete before; -1: none."""
    furthest: int
    """Last step that any attempt has completed."""
    out: tuple[int, ...]
    """Places of this machine that have no rank any more, since they do not work."""
    fault_ns: int
    """Last sign of life of the rank that was lost."""
    seen_ns: int
    stopped_ns: int
    """No process of the former attempt is left."""
    started_ns: int
    """The new ones were asked for, after the wait."""


class TellRestart(Hook):
    """Writes the events `restart` and `preempted` where console, report and TensorBoard hear of them: on rank 0."""

    def __init__(self, pulse: RankPulse, restart: Restart | None) -> None:
        self.pulse, self.restart = pulse, restart
        self._told = 0

    def on_train_start(self, trainer: Trainer) -> None:
        if self.restart is None:
            return
        restart, now = self.restart, time.monotonic_ns()
        entered = self.pulse.entered
        joined = entered.get("join", entered.get("load", now))  # a single rank joins nobody
        phases = {
            "detect": restart.seen_ns - restart.fault_ns,
            "stop": restart.stopped_ns - restart.seen_ns,
            "wait": restart.started_ns - restart.stopped_ns,
            "start": joined - restart.started_ns,
            "join": entered.get("load", now) - joined,
            "load": now - entered.get("load", now),
        }
        source = "start" if trainer.origin is None else "checkpoint"
        trainer.events.write(
            "restart",
            step=trainer.step,
            attempt=restart.attempt,
            reason=restart.reason,
            world_size=trainer.mesh.world_size,
            excluded=list(restart.out),
            source=source,
            lost_steps=max(0, restart.last_step - trainer.step),
            seconds=round((now - restart.fault_ns) / 1e9, 3),
            phases={name: round(took / 1e9, 3) for name, took in phases.items()},
        )

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        number = self.pulse.page.signal
        if number and not self._told:
            self._told = number
            trainer.events.write("preempted", step=trainer.step, signal=signal.Signals(number).name)
