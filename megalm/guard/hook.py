"""The guard at work: it sees each step before its update, asks the probe, decides by the policy, and repairs.

    on_gradients   detector -> (odd?) probe -> verdict -> decision, written to events.jsonl -> update or not
    on_step_end    carry out what goes back: snapshot or checkpoint, data to leave out, learning rate, random numbers

Every rank sees the same numbers (they are reduced over the world) and so decides alike; nothing is sent to agree.
Damaged weights are met in two stages: first the steps since the last clean snapshot are replayed as they were; only if
the damage comes again is data skipped or the learning rate lowered (see megalm.guard.replay).
"""

from __future__ import annotations

import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from megalm.config.guard import GuardConfig
from megalm.guard.advice import list_advice
from megalm.guard.detect import Observation, SpikeDetector
from megalm.guard.policy import Decision, Policy
from megalm.guard.probe import Probe, reach_verdict, use_other_weights, weights_are_broken
from megalm.guard.recover import NAME, Recovery, list_measured
from megalm.guard.replay import History, Replay, StepRecord, find_odd_replicas, gather_fingerprints, list_differing
from megalm.guard.snapshots import Snapshot, SnapshotRing, check_memory
from megalm.journal import format_number
from megalm.parallel.collectives import all_gather
from megalm.train.hooks import Hook
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

log = logging.getLogger(__name__)


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
        self.probe: Probe | None = None
        self.probe_known: float | None = None
        """Where there are no snapshots: the probe's loss when the run was last seen to be well."""
        self.probe_every = 0
        self.warned_at = 0.0
        """Largest attention logit that was warned of."""
        self.pending: Decision | None = None
        self.replica_step = 0
        """Last step at which all replicas were seen to be equal."""
        self.spent = {"observe": 0.0, "snapshots": 0.0}
        """Seconds that the guard took of steps without an event."""
        self._position = 0

    # ------------------------------------------------------------------------------------------------------ life cycle
    def on_resume(self, trainer: Trainer) -> None:
        """Take up a recovery that a crash interrupted."""
        if self.config.enabled:
            self.recovery.resume(trainer)
            trainer.meters.widen(self.policy.widened)

    def on_train_start(self, trainer: Trainer) -> None:
        """Check the memory, and take the first snapshot."""
        if not self.config.enabled:
            return
        self.replica_step = trainer.step
        if self.ring.lags:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.mesh.world_size))
            limit = self.config.ring_memory_gb
            check_memory(self.ring.lags, trainer.boxes(), local_ranks=local, limit_gb=limit)
        if self.config.probe_sequences:
            batches = trainer.batch_source.evaluation_batches(self.config.probe_sequences)
            self.probe = Probe(trainer.evaluator, batches) if batches else None
        if not self.ring.lags:
            # A forward pass is a third of a sequence's step: at this interval the probe is a quarter of a percent of all.
            share = self.config.probe_sequences / (3 * trainer.config.train.global_batch_size)
            self.probe_every = max(16, math.ceil(share / 0.0025))
        self._capture(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        """The learning rate on its way back to schedule."""
        if self.config.enabled and self.config.act:
            trainer.control.set_rate_factor(self.name, self.policy.lr_scale(trainer.step))
        self._position = int(trainer.batch_source.next_positions()[0])
        if self.config.provoke.kind != "none":
            self.ring.settle()  # the damage comes next, and must not reach a snapshot that is still being copied

    def on_gradients(self, trainer: Trainer, signals: Signals) -> bool:
        """Judge the step; False refuses its update."""
        if not self.config.enabled:
            return True
        self.ring.settle()
        step, begun = trainer.step + 1, time.perf_counter()
        seen = self.detector.observe(
            step,
            signals.loss,
            signals.grad_norm,
            signals.nonfinite,
            update_size=self._update_size(trainer, signals),
            loss_spread=signals.loss_spread,
        )
        self._watch_attention(trainer, step, signals)
        self.spent["observe"] += time.perf_counter() - begun
        accepted = self._answer(trainer, step, signals, seen)
        record = StepRecord(
            signals.loss, signals.grad_norm, self._position, trainer.batch_source.samples_consumed, not accepted
        )
        self.history.add(step, record)
        return accepted

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Go back where that was decided; else keep the snapshots fresh."""
        if not self.config.enabled:
            return
        if self.pending is not None:
            decision, self.pending = self.pending, None
            self._carry_out(trainer, decision)
            return
        if self.recovery.replay is None:
            self._check_replicas(trainer)
        due = self.ring.due(trainer.step) or self._probe_is_due(trainer.step)
        if self.pending is None and due and self._calm():
            begun = time.perf_counter()
            self._capture(trainer)
            self.spent["snapshots"] += time.perf_counter() - begun

    # -------------------------------------------------------------------------------------------------------- judgement
    def _answer(self, trainer: Trainer, step: int, signals: Signals, seen: Observation) -> bool:
        replay = self.recovery.replay
        if replay is not None and step <= replay.until:
            known = self.history.get(step)
            if step < replay.until and known is not None and known.same(signals.loss, signals.grad_norm):
                return not known.refused
            if step == replay.until or seen.kind != "none":
                return self._judge_replay(trainer, step, signals, seen)
        if seen.kind == "none":
            return True
        excess = self._probe_excess(trainer, seen.onset if seen.onset >= 0 else step)
        found = reach_verdict(seen.kind, excess, self.config.probe_excess)
        if seen.kind == "nonfinite" and seen.lasting or weights_are_broken(trainer.model_chunks, trainer.mesh):
            found = "weights"
        if found == "data" and "fall" in seen.why:
            found = "unknown"  # too easy to be true, or simply learned: a few updates are refused, no data is left out
        return self._decide(trainer, step, seen, found, excess, signals)

    def _decide(
        self, trainer: Trainer, step: int, seen: Observation, found: str, excess: float | None, signals: Signals
    ) -> bool:
        onset = seen.onset if seen.onset >= 0 else step
        self._observed(trainer, step, seen, found, excess, signals)
        if not self.config.act or not self.config.rungs:
            return True
        if found == "weights" and self.recovery.may_replay(trainer, step, onset):
            self._start_replay(trainer, step, onset, signals)
            return False
        lasting = seen.kind == "shift"
        little = lasting and seen.excess < self.config.data_excess
        if found == "data" and (little or self._is_new_phase(trainer, step)):
            return True  # the weights are fine and the data is only harder: the detector takes up the new level
        decision = self.policy.decide(step, found, onset, slow=seen.slow, lasting=lasting)
        if decision.action == "accept":
            return True
        if lasting and found == "data":
            self.detector.keep_level(onset)
        if decision.action == "skip":
            self._event(trainer, "skip", decision, samples=self._samples(trainer))
            return False
        self.pending = decision
        return False

    def _start_replay(self, trainer: Trainer, step: int, onset: int, signals: Signals) -> None:
        prints = gather_fingerprints(trainer.model_chunks, trainer.boxes(), trainer.mesh.world, trainer.mesh.device)
        self.recovery.plan_replay(step, onset, signals, prints)
        self.policy.count += 1
        self.pending = Decision(self.policy.count, step, "replay", "weights", onset)

    def _judge_replay(self, trainer: Trainer, step: int, signals: Signals, seen: Observation) -> bool:
        """The replay arrived at the step that gave the alarm, or met trouble of its own before."""
        replay, self.recovery.replay = self.recovery.replay, None
        assert replay is not None
        prints = gather_fingerprints(trainer.model_chunks, trainer.boxes(), trainer.mesh.world, trainer.mesh.device)
        same = replay.loss == list_measured(signals)
        if same or seen.kind != "none":
            excess = self._probe_excess(trainer, replay.onset)
            return self._decide(trainer, step, seen, "weights", excess, signals)
        ranks = list_differing(replay.fingerprints, prints)
        trainer.events.write(
            "verdict",
            step=step,
            onset=replay.onset,
            cause="hardware",
            ranks=ranks,
            loss=signals.loss,
            loss_before=replay.loss[0],
            text="the same steps gave "
            + _numbers(list_measured(signals))
            + ", not "
            + _numbers(replay.loss)
            + ": "
            + (f"rank {ranks[0]} had computed wrongly" if len(ranks) == 1 else _many(ranks)),
        )
        return True

    def _observed(
        self, trainer: Trainer, step: int, seen: Observation, found: str, excess: float | None, signals: Signals
    ) -> None:
        trainer.events.write(
            "spike",
            step=step,
            onset=seen.onset if seen.onset >= 0 else step,
            seen=seen.kind,
            cause=found,
            slow=seen.slow,
            loss=signals.loss,
            expected=seen.expected,
            z=seen.z,
            grad_norm=signals.grad_norm,
            grad_z=seen.gradient_z,
            why=list(seen.why),
            update_rms=signals.update_rms,
            attention_logit=signals.attention_logit,
            loss_spread=signals.loss_spread,
            worst_rank=signals.worst_rank if signals.loss_spread is not None else None,
            nonfinite=signals.nonfinite,
            probe_excess=excess,
            samples=self._samples(trainer),
            lr_scale=trainer.control.lr_scale,
        )

    def _probe_excess(self, trainer: Trainer, onset: int) -> float | None:
        """The probe's loss with the weights as they are, above that with those of the newest trusted snapshot.

        Nothing is spent on it before something is odd: the reference is found when it is asked for.
        """
        if self.probe is None:
            return None
        now, known = self.probe.loss(), self.probe_known
        if self.ring.lags:
            snapshot = self.ring.choose(onset - self.config.margin) or self.ring.choose(onset - 1)
            if snapshot is None:
                return None
            if snapshot.probe is None:
                with use_other_weights(trainer, trainer.boxes(), snapshot.tensors):
                    snapshot.probe = self.probe.loss()
            known = snapshot.probe
        return None if known is None else now - known

    def _probe_is_due(self, step: int) -> bool:
        """Where no snapshots are kept: at the interval, and at powers of two, since losses fall fast at first."""
        every = self.probe_every
        return every > 0 and (step % every == 0 or step >= 16 and step & (step - 1) == 0)

    def _update_size(self, trainer: Trainer, signals: Signals) -> float | None:
        """The coming update in units of the learning rate that schedule and policy want: what they change is no fault."""
        if signals.update_rms is None or trainer.lr <= 0:
            return None
        wanted = self.policy.lr_scale(trainer.step) if self.config.act else 1.0
        return signals.update_rms / trainer.lr * trainer.control.lr_scale / wanted

    def _is_new_phase(self, trainer: Trainer, step: int) -> bool:
        """The data has changed because the curriculum wants it to."""
        started = trainer.batch_source.phase_at(step - 1).first_step
        return started > 0 and step - started <= self.config.detector.window

    def _watch_attention(self, trainer: Trainer, step: int, signals: Signals) -> None:
        """Warn, once at each doubling, of attention logits that grow as they do long before a run diverges."""
        limit, logit = self.config.attention_warning, signals.attention_logit
        if not limit or logit is None or not max(limit, 2 * self.warned_at) <= logit < math.inf:
            return
        self.warned_at = logit
        hints = [hint for hint in list_advice(trainer.config) if "attention" in hint]
        text = f"attention logits reach {logit:.0f}, as they do long before a run diverges"
        if hints:
            text += f"; what keeps them down in a new run: {' or '.join(hint.partition(':')[0] for hint in hints)}"
        trainer.events.write(
            "warning", step=step, what="attention_logit", attention_logit=logit, text=text, advice=hints
        )

    # ----------------------------------------------------------------------------------------------------------- repair
    def _carry_out(self, trainer: Trainer, decision: Decision) -> None:
        """Written down first, then done; a crash in between is taken up by `Recovery.resume`."""
        if decision.action == "skip_data":
            first = trainer.batch_source.samples_consumed
            samples = [first, first + decision.skip_after * trainer.batch_source.phase.global_batch_size]
            self._event(trainer, "skip", decision, samples=samples)
            trainer.batch_source.skip(*samples)
            return
        if decision.action == "give_up":
            self._give_up(trainer, decision)
            return
        source = self.recovery.source(trainer, decision)
        if source is None:
            self._give_up(trainer, decision, "no snapshot and no checkpoint from before the onset is left")
            return
        plan = self.recovery.plan(trainer, decision, source)
        self.recovery.announce(trainer, decision, plan)
        begun = time.perf_counter()
        if decision.action == "widen":
            products = trainer.meters.widen(self.policy.widened)
            text = f"{len(products)} products are computed in {trainer.config.precision.dtype} from here on"
            self._event(trainer, "widen", decision, products=products, text=text)
        self.recovery.go_back(trainer, plan, source)
        self.pending = None
        if not isinstance(source, Snapshot):
            self._capture(trainer)
        trainer.events.write("recovered", step=trainer.step, seconds=round(time.perf_counter() - begun, 4))
        self.replica_step = min(self.replica_step, trainer.step)

    def _give_up(self, trainer: Trainer, decision: Decision, reason: str = "") -> None:
        report = self.recovery.report(trainer, decision, reason)
        self._event(trainer, "give_up", decision, reason=reason or "the ladder is exhausted", **report)
        if trainer.is_writer:
            path = trainer.folder / "guard_report.txt"
            try:
                path.write_text(report["text"])
            except OSError as error:  # the same words are in the event
                log.warning("%s cannot be written: %s", path, error)
            log.error("the guard gave up at step %d: see %s", decision.step, path)
        trainer.checkpoints.discard_after(max(0, decision.onset - self.config.margin))
        trainer.control.finish(3)

    def _calm(self) -> bool:
        d = self.detector
        return not (d.raised or d.run or d.nonfinite) and d.sum <= self.config.detector.freeze

    def _capture(self, trainer: Trainer) -> None:
        """A snapshot; where none are kept, the probe's loss, unless it says that the state is not clean."""
        if self.ring.lags:
            self.ring.capture(trainer.step, trainer.boxes(), trainer.state_dict())
        elif self.probe is not None:
            loss = self.probe.loss()
            if self.probe_known is None or loss - self.probe_known <= self.config.probe_excess:
                self.probe_known = loss

    def _check_replicas(self, trainer: Trainer) -> None:
        every, mesh = self.config.replica_check_every, trainer.mesh
        if not every or max(mesh.data_context.size, mesh.expert_data.size) == 1 or trainer.step % every:
            return
        device = trainer.mesh.device
        trainer.optimizer.wait_weights()
        odd = find_odd_replicas(trainer.model_chunks, mesh)
        flags = torch.zeros(trainer.mesh.world_size, dtype=torch.int64, device=device)
        flags[odd] = 1
        odd = _union(flags, trainer.mesh.world)
        if not odd:
            self.replica_step = trainer.step
            return
        trainer.events.write(
            "verdict",
            step=trainer.step,
            onset=self.replica_step + 1,
            cause="hardware",
            ranks=odd,
            text=f"weights that must be equal on all replicas differ: {_many(odd)}",
        )
        if self.config.act and self.config.rungs:
            self.policy.count += 1
            decision = Decision(self.policy.count, trainer.step, "replay", "hardware", self.replica_step + 1)
            self._carry_out(trainer, decision)

    # ----------------------------------------------------------------------------------------------------------- details
    def _samples(self, trainer: Trainer) -> list[int]:
        return [self._position, trainer.batch_source.samples_consumed]

    def _event(self, trainer: Trainer, kind: str, decision: Decision, **fields: Any) -> None:
        fields = {"cause": decision.verdict, "onset": decision.onset, "lr_scale": trainer.control.lr_scale, **fields}
        trainer.events.write(kind, step=decision.step, **fields, decision=decision.as_dict())

    def state_dict(self) -> dict[str, Any]:
        """In the checkpoint: statistics, books and a replay under way."""
        if not self.config.enabled:
            return {}
        return {
            "detector": self.detector.state_dict(),
            "policy": self.policy.state_dict(),
            "replay": None if self.recovery.replay is None else self.recovery.replay.as_dict(),
            "replayed_at": self.recovery.replayed_at,
            "probe": self.probe_known,
            "warned_at": self.warned_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At a start; when the guard itself goes back, `Recovery` takes the statistics alone."""
        if not state:
            return
        self.detector.load_state_dict(state["detector"])
        self.policy.load_state_dict(state["policy"])
        self.recovery.replay = None if state["replay"] is None else Replay(**state["replay"])
        self.recovery.replayed_at = state["replayed_at"]
        self.probe_known = state["probe"]
        self.warned_at = state.get("warned_at", 0.0)


def _union(flags: torch.Tensor, axis: Any) -> list[int]:
    if axis.size > 1:
        flags = all_gather(flags.unsqueeze(0), axis).amax(0)
    return torch.nonzero(flags).flatten().tolist()


def _numbers(texts: list[str]) -> str:
    names = ("loss", "gradient norm", "update")
    known = [(name, text) for name, text in zip(names, texts, strict=False) if text != repr(None)]
    return ", ".join(f"{name} {format_number(text, '.10g')}" for name, text in known)


def _many(ranks: list[int]) -> str:
    if not ranks:
        return "which rank had computed wrongly cannot be told, all weights agree again"
    return f"one of the ranks {', '.join(map(str, ranks))} had computed wrongly"
