"""The guard at work: it sees each step before its update, judges it, and repairs.

    on_gradients   `Judge`: detector -> (odd?) probe -> verdict -> decision, written to events.jsonl -> update or not
    on_step_end    `Recovery`: what goes back: snapshot or checkpoint, data to leave out, learning rate, random numbers

Damaged weights are met in two stages: first the steps since the last clean snapshot are replayed as they were; only if
the damage comes again is data skipped or the learning rate lowered (see megalm.guard.replay).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from megalm.config.guard import GuardConfig
from megalm.guard.detect import SpikeDetector
from megalm.guard.judge import Judge
from megalm.guard.policy import Decision, Policy
from megalm.guard.recover import NAME, Recovery
from megalm.guard.reference import Reference
from megalm.guard.replay import History, Replay, StepRecord
from megalm.guard.replicas import ReplicaWatch
from megalm.guard.snapshots import SnapshotRing, check_memory
from megalm.guard.watch import AttentionWatch
from megalm.train.hooks import Hook
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class GuardHook(Hook):
    """Attach it to a trainer; `guard=off|watch|default|strict` chooses what it may do."""

    name = NAME

    def __init__(self, config: GuardConfig):
        self.config = config
        self.detector = SpikeDetector(config.detector)
        self.policy = Policy(config)
        self.history = History()
        self.ring = SnapshotRing(config.snapshot_lags if config.act and config.rungs else ())
        self.recovery = Recovery(config, self.ring, self.policy, self.history, self.detector)
        self.reference = Reference(config, self.ring)
        self.judge = Judge(config, self.detector, self.policy, self.history, self.recovery, self.reference)
        self.attention, self.replicas = AttentionWatch(config), ReplicaWatch(config)
        self.spent = {"observe": 0.0, "snapshots": 0.0}
        """Seconds that the guard took of steps without an event."""

    def on_resume(self, trainer: Trainer) -> None:
        """Take up a recovery that a crash interrupted."""
        if self.config.enabled:
            self.recovery.resume(trainer)
            trainer.meters.widen(self.policy.widened)

    def on_train_start(self, trainer: Trainer) -> None:
        """Check the memory, and take the first snapshot."""
        if not self.config.enabled:
            return
        self._say_what_is_missing(trainer)
        self.replicas.equal_at = trainer.step
        if self.ring.lags:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.mesh.world_size))
            limit = self.config.ring_memory_gb
            check_memory(self.ring.lags, trainer.boxes(), local_ranks=local, limit_gb=limit)
        self.reference.prepare(trainer)
        self._capture(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        """The learning rate on its way back to schedule."""
        if self.config.enabled and self.config.act:
            trainer.control.set_rate_factor(self.name, self.policy.lr_scale(trainer.step))
        self.judge.position = int(trainer.batch_source.next_positions()[0])
        if self.config.provoke.kind != "none":
            self.ring.settle()  # the damage comes next, and must not reach a snapshot that is still being copied

    def on_gradients(self, trainer: Trainer, signals: Signals) -> bool:
        """Judge the step; False refuses its update."""
        if not self.config.enabled:
            return True
        self.ring.settle()
        step, begun = trainer.step + 1, time.perf_counter()
        seen = self.judge.observe(trainer, step, signals)
        self.attention.look(trainer, step, signals)
        self.spent["observe"] += time.perf_counter() - begun
        accepted = self.judge.answer(trainer, step, signals, seen)
        first, last = self.judge.position, trainer.batch_source.samples_consumed
        self.history.add(step, StepRecord(signals.loss, signals.grad_norm, first, last, not accepted))
        return accepted

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Go back where that was decided; else keep the snapshots fresh."""
        if not self.config.enabled:
            return
        decision, self.judge.pending = self.judge.pending, None
        if decision is not None:
            self._carry_out(trainer, decision)
            return
        if self.recovery.replay is None and self.replicas.look(trainer) and self.config.act and self.config.rungs:
            self._heal(trainer)
        due = self.ring.due(trainer.step) or self.reference.is_due(trainer.step)
        if due and self._is_calm():
            begun = time.perf_counter()
            self._capture(trainer)
            self.spent["snapshots"] += time.perf_counter() - begun

    def _heal(self, trainer: Trainer) -> None:
        """Go back to where all replicas were equal and make the steps again; where no such state is left, the odd ranks take
        the majority's weights, and the run goes on with what the wrong ones did to it."""
        decision = Decision(self.policy.count + 1, trainer.step, "replay", "hardware", self.replicas.equal_at + 1)
        if self.recovery.source(trainer, decision) is None and self.replicas.has_majority(trainer.mesh):
            self.replicas.copy_majority(trainer)
            who = ", ".join(map(str, self.replicas.odd))
            text = f"ranks {who} took the weights of the others; steps from {decision.onset} on were made with the wrong ones"
            trainer.events.write("recovered", step=trainer.step, ranks=self.replicas.odd, text=text)
            self.replicas.equal_at = trainer.step
            return
        self.policy.count += 1
        self._carry_out(trainer, decision)

    def _carry_out(self, trainer: Trainer, decision: Decision) -> None:
        gone_back_to = self.recovery.carry_out(trainer, decision)
        if gone_back_to is None:
            return
        if gone_back_to == "checkpoint":
            self._capture(trainer)
        self.replicas.equal_at = min(self.replicas.equal_at, trainer.step)

    def _say_what_is_missing(self, trainer: Trainer) -> None:
        """A run that adds in another order each time cannot be replayed."""
        if self.config.act and self.config.replay and trainer.config.train.determinism != "strict":
            text = (
                "train.determinism=fast: steps made again give other bits, so the guard does not replay them, and answers "
                "damaged weights by going back at once"
            )
            trainer.events.write("warning", step=trainer.step, what="replay", text=text)

    def _is_calm(self) -> bool:
        d = self.detector
        return not (d.raised or d.run or d.nonfinite) and d.sum <= self.config.detector.freeze

    def _capture(self, trainer: Trainer) -> None:
        """A snapshot; where none are kept, a note of the probe's loss."""
        if self.ring.lags:
            self.ring.capture(trainer.step, trainer.boxes(), trainer.state_dict())
        else:
            self.reference.note()

    def state_dict(self) -> dict[str, Any]:
        """In the checkpoint: statistics, books and a replay under way."""
        if not self.config.enabled:
            return {}
        return {
            "detector": self.detector.state_dict(),
            "policy": self.policy.state_dict(),
            "replay": None if self.recovery.replay is None else self.recovery.replay.as_dict(),
            "replayed_at": self.recovery.replayed_at,
            "probe": self.reference.known,
            "warned_at": self.attention.warned_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At a start; when the guard itself goes back, `Recovery` takes the statistics alone."""
        if not state:
            return
        self.detector.load_state_dict(state["detector"])
        self.policy.load_state_dict(state["policy"])
        self.recovery.replay = None if state["replay"] is None else Replay(**state["replay"])
        self.recovery.replayed_at = state["replayed_at"]
        self.reference.known = state["probe"]
        self.attention.warned_at = state.get("warned_at", 0.0)
