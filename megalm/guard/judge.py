"""Judges a step before its update: what is odd about it, why, and what follows.

    detector -> (odd?) probe -> verdict -> decision, written to events.jsonl -> update or not

Every rank sees the same numbers (they are reduced over the world) and so decides alike; nothing is sent to agree.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megalm.config.guard import GuardConfig
from megalm.guard.detect import Observation, SpikeDetector
from megalm.guard.policy import Decision, Policy
from megalm.guard.probe import has_broken_weights, reach_verdict
from megalm.guard.recover import Recovery, list_measured, write_decision
from megalm.guard.reference import Reference
from megalm.guard.replay import History, gather_fingerprints, list_differing
from megalm.guard.replicas import name_ranks
from megalm.journal import format_number
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class Judge:
    """Says whether a step's update is made, and leaves what goes back to be carried out when the step ends."""

    def __init__(
        self,
        config: GuardConfig,
        detector: SpikeDetector,
        policy: Policy,
        history: History,
        recovery: Recovery,
        reference: Reference,
    ) -> None:
        self.config, self.detector, self.policy, self.history = config, detector, policy, history
        self.recovery, self.reference = recovery, reference
        self.pending: Decision | None = None
        """What the run goes back for at the end of this step."""
        self.position = 0
        """First sample of this step."""

    def observe(self, trainer: Trainer, step: int, signals: Signals) -> Observation:
        """Show the detector what the step measured; of a loss whose height says nothing, only whether it is finite."""
        level = signals.loss if signals.judged or not math.isfinite(signals.loss) else 1.0
        return self.detector.observe(
            step,
            level,
            signals.grad_norm,
            signals.nonfinite,
            update_size=self._update_size(trainer, signals),
            loss_spread=signals.loss_spread if signals.judged else None,
        )

    def answer(self, trainer: Trainer, step: int, signals: Signals, seen: Observation) -> bool:
        """Whether the update is made."""
        replay = self.recovery.replay
        if replay is not None and step <= replay.until:
            known = self.history.get(step)
            if step < replay.until and known is not None and known.same(signals.loss, signals.grad_norm):
                return not known.refused
            if step == replay.until or seen.kind != "none":
                return self._judge_replay(trainer, step, signals, seen)
        if seen.kind == "none":
            return True
        excess = self.reference.excess(trainer, seen.onset if seen.onset >= 0 else step)
        found = reach_verdict(seen.kind, excess, self.config.probe_excess)
        if seen.kind == "nonfinite" and seen.lasting or has_broken_weights(trainer.model_chunks, trainer.mesh):
            found = "weights"
        if found == "data" and "fall" in seen.why:
            found = "unknown"  # too easy to be true, or simply learned: a few updates are refused, no data is left out
        return self._decide(trainer, step, seen, found, excess, signals)

    def _decide(
        self, trainer: Trainer, step: int, seen: Observation, found: str, excess: float | None, signals: Signals
    ) -> bool:
        onset = seen.onset if seen.onset >= 0 else step
        self._tell(trainer, step, seen, found, excess, signals)
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
            write_decision(trainer, "skip", decision, samples=self._list_samples(trainer))
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
            excess = self.reference.excess(trainer, replay.onset)
            return self._decide(trainer, step, seen, "weights", excess, signals)
        ranks = list_differing(replay.fingerprints, prints)
        wrong = f"rank {ranks[0]} had computed wrongly" if len(ranks) == 1 else name_ranks(ranks)
        trainer.events.write(
            "verdict",
            step=step,
            onset=replay.onset,
            cause="hardware",
            ranks=ranks,
            loss=signals.loss,
            loss_before=replay.loss[0],
            text=f"the same steps gave {_show(list_measured(signals))}, not {_show(replay.loss)}: {wrong}",
        )
        return True

    def _tell(
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
            samples=self._list_samples(trainer),
            lr_scale=trainer.control.lr_scale,
        )

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

    def _list_samples(self, trainer: Trainer) -> list[int]:
        """(first, behind the last) of this step."""
        return [self.position, trainer.batch_source.samples_consumed]


def _show(texts: list[str]) -> str:
    names = ("loss", "gradient norm", "update")
    known = [(name, text) for name, text in zip(names, texts, strict=False) if text != repr(None)]
    return ", ".join(f"{name} {format_number(text, '.10g')}" for name, text in known)
