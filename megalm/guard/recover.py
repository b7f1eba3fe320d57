"""Going back: from which state, leaving out which data, in an order that survives a crash at any point.

    plan -> announce (events.jsonl, on disk) -> go_back -> the run goes on

A process that dies after the announcement starts from a checkpoint and finds the announcement: decisions with a higher
number than the checkpoint's books know are taken up again (`resume`), so that the same recovery goes on.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from megalm.checkpoint.commit import list_committed, parse_step
from megalm.checkpoint.random_state import restore_random_state
from megalm.config.guard import GuardConfig
from megalm.guard.advice import list_advice
from megalm.guard.detect import SpikeDetector
from megalm.guard.policy import Decision, Policy
from megalm.guard.replay import History, Replay
from megalm.guard.snapshots import Snapshot, SnapshotRing
from megalm.journal import read_events
from megalm.parallel.collectives import all_reduce
from megalm.parallel.random import seed_ranks

if TYPE_CHECKING:
    from megalm.train.signals import Signals
    from megalm.train.trainer import Trainer

log = logging.getLogger(__name__)

NAME = "guard"
"""The guard among the hooks; its state in a checkpoint is kept by it."""
EARLIER_NAME = "GuardHook"
"""By which earlier versions kept it."""


def list_measured(signals: Signals) -> list[str]:
    """List what a replay must give again, bit by bit: loss, gradient norm, and the size of the coming update, which shows what
    the other two do not (the optimizer's state and the learning rate)."""
    return [repr(signals.loss), repr(signals.grad_norm), repr(signals.update_rms)]


@dataclass
class ReturnPlan:
    """What a return does, complete: enough for another process to do it."""

    target: int
    """Step to go back to."""
    source: str
    """memory | checkpoint"""
    replay: Replay | None
    """The replay that begins there."""
    replayed_at: int | None
    samples: list[int] | None = None
    """Positions [first, last) of the stream to leave out."""
    seed: int | None = None
    """From which the rest of the data and the random numbers are drawn anew."""
    reset_moments: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As the event has it; without a seed where there is none."""
        return {key: value for key, value in asdict(self).items() if key != "seed" or value is not None}

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> ReturnPlan:
        replay = plan.get("replay")
        return cls(**{**plan, "replay": None if replay is None else Replay(**replay)})


def write_decision(trainer: Trainer, kind: str, decision: Decision, **fields: Any) -> None:
    """Write a decision down as an event of this kind."""
    fields = {"cause": decision.verdict, "onset": decision.onset, "lr_scale": trainer.control.lr_scale, **fields}
    trainer.events.write(kind, step=decision.step, **fields, decision=decision.as_dict())


class Recovery:
    """Carries out decisions that go back, and remembers a replay under way."""

    def __init__(
        self, config: GuardConfig, ring: SnapshotRing, policy: Policy, history: History, detector: SpikeDetector
    ):
        self.config, self.ring, self.policy, self.history, self.detector = config, ring, policy, history, detector
        self.replay: Replay | None = None
        self.replayed_at: int | None = None

    # ------------------------------------------------------------------------------------------------------------ replay
    def may_replay(self, trainer: Trainer, step: int, onset: int) -> bool:
        """Whether a replay can tell anything: deterministic, a trusted snapshot, and not just done."""
        if not (self.config.replay and trainer.config.train.determinism == "strict"):
            return False
        if self.replayed_at is not None and abs(step - self.replayed_at) <= self.config.recurrence:
            return False
        return self._snapshot(onset, 1) is not None

    def plan_replay(self, step: int, onset: int, signals: Signals, fingerprints: list[int]) -> None:
        """Remember what was seen, for the comparison when the replay arrives at `step`."""
        self.replayed_at = step
        self.replay = Replay(step, onset, list_measured(signals), fingerprints)

    # ----------------------------------------------------------------------------------------------------------- repair
    def carry_out(self, trainer: Trainer, decision: Decision) -> Literal["memory", "checkpoint"] | None:
        """Written down first, then done; a crash in between is taken up by `resume`. Returns where the run went back to."""
        if decision.action == "skip_data":
            first = trainer.batch_source.samples_consumed
            samples = [first, first + decision.skip_after * trainer.batch_source.phase.global_batch_size]
            write_decision(trainer, "skip", decision, samples=samples)
            trainer.batch_source.skip(*samples)
            return None
        if decision.action == "give_up":
            self._give_up(trainer, decision)
            return None
        source = self.source(trainer, decision)
        if source is None:
            self._give_up(trainer, decision, "no snapshot and no checkpoint from before the onset is left")
            return None
        plan = self.plan(trainer, decision, source)
        self.announce(trainer, decision, plan)
        begun = time.perf_counter()
        if decision.action == "widen":
            products = trainer.meters.widen(self.policy.widened)
            text = f"{len(products)} products are computed in {trainer.config.precision.dtype} from here on"
            write_decision(trainer, "widen", decision, products=products, text=text)
        self.go_back(trainer, plan, source)
        trainer.events.write("recovered", step=trainer.step, seconds=round(time.perf_counter() - begun, 4))
        return "memory" if isinstance(source, Snapshot) else "checkpoint"

    def _give_up(self, trainer: Trainer, decision: Decision, reason: str = "") -> None:
        report = self.report(trainer, decision, reason)
        write_decision(trainer, "give_up", decision, reason=reason or "the ladder is exhausted", **report)
        if trainer.is_writer:
            path = trainer.folder / "guard_report.txt"
            try:
                path.write_text(report["text"])
            except OSError as error:  # the same words are in the event
                log.warning("%s cannot be written: %s", path, error)
            log.error("the guard gave up at step %d: see %s", decision.step, path)
        trainer.checkpoints.discard_after(max(0, decision.onset - self.config.margin))
        trainer.control.finish(3)

    # --------------------------------------------------------------------------------------------------------- going back
    def source(self, trainer: Trainer, decision: Decision) -> Snapshot | Path | None:
        """Where to go back to: a snapshot, else the newest checkpoint from before the onset, else nowhere."""
        latest = decision.onset - (
            1 if decision.verdict == "hardware" else self.config.margin
        )  # there the onset is known
        snapshot = self.ring.choose(latest, decision.attempt)
        return snapshot if snapshot is not None else self._checkpoint(trainer, latest)

    def _snapshot(self, onset: int, attempt: int) -> Snapshot | None:
        return self.ring.choose(onset - self.config.margin, attempt)

    def _checkpoint(self, trainer: Trainer, latest: int) -> Path | None:
        """The newest checkpoint of at most this step. Comm: a broadcast from rank 0."""
        checkpoints = trainer.checkpoints
        checkpoints.settle()
        fitting = (
            [p for p in list_committed(checkpoints.folder) if parse_step(p) <= latest] if trainer.is_writer else []
        )
        return checkpoints.broadcast(fitting[0] if fitting else None)

    def plan(self, trainer: Trainer, decision: Decision, source: Snapshot | Path) -> ReturnPlan:
        """What will be done, complete: enough for another process to do it."""
        target = source.step if isinstance(source, Snapshot) else parse_step(source)
        plan = ReturnPlan(
            target=target,
            source="memory" if isinstance(source, Snapshot) else "checkpoint",
            replay=self.replay,
            replayed_at=self.replayed_at,
        )
        if decision.action == "replay":
            return plan
        batch = trainer.batch_source.phase.global_batch_size
        first = self.history.first_position(max(decision.onset - decision.skip_before, target + 1))
        last = trainer.batch_source.samples_consumed + decision.skip_after * batch
        if first is not None and last > first:
            plan.samples = [first, min(last, first + self.config.skip_limit * batch)]
        if decision.action == "reseed":
            plan.seed = trainer.config.train.seed + decision.number
        plan.reset_moments = decision.reset_moments
        return plan

    def announce(self, trainer: Trainer, decision: Decision, plan: ReturnPlan) -> None:
        """On disk on rank 0 before any rank goes on."""
        common = {"cause": decision.verdict, "onset": decision.onset, "samples": plan.samples}
        scale = self.policy.lr_scale(plan.target)
        trainer.events.write(
            "replay" if decision.action == "replay" else "rollback",
            step=decision.step,
            **common,
            action=decision.action,
            to_step=plan.target,
            source=plan.source,
            lr_scale=scale,
            decision=decision.as_dict(),
            plan=plan.as_dict(),
        )
        if decision.action == "lower_lr":
            trainer.events.write(
                "lr_adjust", step=decision.step, **common, lr_scale=scale, rewarm_steps=decision.rewarm_steps
            )
        # Not over the checkpoints' group: a save that is being written talks over that one.
        all_reduce(torch.zeros(1, device=trainer.mesh.device), trainer.mesh.world).item()

    def go_back(self, trainer: Trainer, plan: ReturnPlan, source: Snapshot | Path) -> None:
        """Restore the state, discard what came after it, and leave out the data."""
        if isinstance(source, Snapshot):
            self.ring.restore(source, trainer.boxes())
            self._restore(trainer, source.state)
        else:
            self._load(trainer, source)
        trainer.attempt += 1
        self._leave_out(trainer, plan)
        self._forget_later(trainer)

    def _forget_later(self, trainer: Trainer) -> None:
        """No checkpoint of a later step may be left: a restart would take it up and be where the run did not want to be.

        The only good checkpoint is never deleted, so where it is a later one the state gone back to is saved first.
        """
        checkpoints = trainer.checkpoints
        checkpoints.discard_after(trainer.step)
        newest = list_committed(checkpoints.folder) if trainer.is_writer else []
        if not checkpoints.broadcast(bool(newest) and parse_step(newest[0]) > trainer.step):
            return
        trainer.save(wait=True)  # retention leaves it alone: later ones count for nothing since the run went back
        checkpoints.discard_after(trainer.step)

    def _load(self, trainer: Trainer, path: Path) -> None:
        state, random = trainer.checkpoints.load(trainer.boxes(), path=path)
        self._restore(trainer, state)
        if random:
            restore_random_state(random)
        self.ring.clear()

    def _restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """The run's state; of the guard's own only the statistics go back with the weights: what was decided stays decided."""
        trainer.restore(state, keep=(NAME,))
        if own := state["hooks"].get(NAME) or state["hooks"].get(EARLIER_NAME):
            self.detector.load_state_dict(own["detector"])

    def _leave_out(self, trainer: Trainer, plan: ReturnPlan) -> None:
        if plan.samples is not None:
            trainer.batch_source.skip(*plan.samples)
        if plan.seed is not None:
            position = trainer.batch_source.samples_consumed
            trainer.events.write(
                "reseed", step=trainer.step, seed=plan.seed, position=position, to_step=trainer.step,
                samples=plan.samples, lr_scale=trainer.control.lr_scale,
            )  # fmt: skip
            seed_ranks(plan.seed, trainer.mesh)
            trainer.batch_source.reseed(plan.seed)
        if plan.reset_moments:
            trainer.optimizer.reset_moments()

    # -------------------------------------------------------------------------------------------------- after a crash
    def resume(self, trainer: Trainer) -> None:
        """Take up decisions that were written down but are unknown to the state that the run started from."""
        events = read_events(trainer.events.path) if trainer.is_writer and trainer.config.checkpoint.resume else []
        events = trainer.checkpoints.broadcast([e for e in events if self._is_open(e)])
        if not events:
            return
        returns = [e for e in events if "plan" in e]
        if returns and trainer.step > (target := min(e["plan"]["target"] for e in returns)):
            # Saved between the onset and the decision: what it holds is what the decision wanted to leave behind.
            older = self._checkpoint(trainer, target)
            if older is not None:
                self._load(trainer, older)
            self._forget_later(trainer)
        for event in events:
            decision = Decision(**event["decision"])
            self.policy.adopt(decision)
            if "plan" in event:
                plan = ReturnPlan.from_dict(event["plan"])
                self._leave_out(trainer, plan)
                self.replay, self.replayed_at = plan.replay, plan.replayed_at
            else:
                trainer.batch_source.skip(*event["samples"])
        trainer.events.write(
            "resume_recovery",
            step=trainer.step,
            decisions=[e["decision"]["number"] for e in events],
            lr_scale=self.policy.lr_scale(trainer.step),
        )

    def _is_open(self, event: dict[str, Any]) -> bool:
        decision = event.get("decision")
        if not decision or decision["number"] <= self.policy.count:
            return False
        return "plan" in event or decision["action"] == "skip_data"

    # ----------------------------------------------------------------------------------------------------------- the end
    def report(self, trainer: Trainer, decision: Decision, reason: str) -> dict[str, Any]:
        """What a person needs to go on: the suspect samples, and what prevents such trouble."""
        record = self.history.get(decision.onset) or self.history.get(decision.step)
        suspects = trainer.batch_source.describe(range(record.first, record.last)) if record is not None else []
        hints = list_advice(trainer.config)
        lines = [
            f"The guard gave up at step {decision.step}: {reason or 'every rung of the ladder is used up'}.",
            f"Cause: {decision.verdict}; first seen at step {decision.onset}.",
            "",
            "Suspect samples (the batch of the onset):",
            *(f"  {s['source']}: document {s['document']}, offset {s['offset']}" for s in suspects),
            "",
            "What others changed after such trouble:",
            *(f"  {hint}" for hint in hints),
        ]
        return {"suspects": suspects[:64], "advice": hints, "text": "\n".join(lines) + "\n"}
