"""The training run, readable top to bottom: resume, step, evaluate, save. Its parts are built in `parts`, all else hooks in."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.random_state import take_random_state
from megalm.config.phases import list_configured_spans
from megalm.data.batch import Batch
from megalm.data.phases import Phase
from megalm.optim.lr import compute_phased_learning_rate
from megalm.parallel.context import shard_batch
from megalm.parallel.slices import Box, state_boxes
from megalm.train.build import find_local_seq_length
from megalm.train.control import RunControl
from megalm.train.hooks import Hook, check_names, collect_states, state_of
from megalm.train.pulse import Pulse
from megalm.train.record import Progress, StepRecords
from megalm.train.resume import Origin, resume, tell_origin
from megalm.train.signals import Signals
from megalm.train.soundness import Soundness

if TYPE_CHECKING:
    from megalm.train.parts import Parts


class Trainer:
    """One run on this rank.

    `step` counts completed updates (refused ones too); `tokens` the tokens of the batches they consumed. After `train()`
    returns 0 the run is complete and saved, 130 it was interrupted and saved, 3 a hook gave up, 1 it ended otherwise
    (`control.reason`).
    """

    def __init__(
        self,
        parts: Parts,
        *,
        hooks: Sequence[Hook] = (),
        peak_flops: float | None = None,
        environment: Mapping[str, object] | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        """
        hooks: asked in this order at every moment; more may be added to `hooks` before `train`.
        peak_flops: of one device, for utilisation. environment: what the run is on, for the event of its start.
        pulse: told where this rank stands, for whoever watches it.
        """
        config = parts.config
        assert config.train.steps is not None
        self.config, self.mesh, self.folder, self.events = config, parts.mesh, parts.folder, parts.events
        self.objective, self.model_chunks, self.optimizer = parts.objective, parts.model_chunks, parts.optimizer
        self.executor, self.batch_source, self.checkpoints = parts.executor, parts.batch_source, parts.checkpoints
        self.measurement, self.evaluator, self.logit_clip = parts.measurement, parts.evaluator, parts.logit_clip
        self.balance = parts.balance
        self.meters = parts.meters
        self.hooks, self.pulse = list(hooks), pulse or Pulse()
        self.control = RunControl()
        self.records = StepRecords(config, parts.mesh.world_size, peak_flops)
        self.spans = list_configured_spans(config)
        self.total_steps = config.train.steps
        self.is_writer = parts.mesh.rank == 0
        self.step = 0
        self.tokens = 0
        self.lr = 0.0  # of the update under way
        self.attempt = 0  # times that the run went back; steps of metrics.jsonl are made again with a higher number
        self.soundness = Soundness()
        self.origin: Origin | None = None  # what it began with
        self._environment = dict(environment or {})
        self._stopping = False  # what the ranks agreed on in the last step
        self._saved_step = 0

    # ------------------------------------------------------------------------------------------------------ the run
    def train(self) -> int:
        """Go on from where the run stands to its last step; returns the exit status.

        Where nothing is left to train, nothing is written: the folder stays the record of what was trained.
        """
        status, started = 1, []
        try:
            check_names(self.hooks)
            self.events.listeners += [hook.on_event for hook in self.hooks]
            self.origin = resume(self)
            for hook in self.hooks:
                hook.on_resume(self)
            if self.step >= self.total_steps:
                for hook in self.hooks:
                    hook.on_complete(self)
                status = 0
                return status
            tell_origin(self, self._environment)
            for hook in self.hooks:
                hook.on_train_start(self)
                started.append(hook)
            self.pulse.complete_step(self.step, self.checkpoints.durable)
            while self.step < self.total_steps and self.control.status == 0:
                record = self.train_step()
                for hook in self.hooks:
                    hook.on_step_end(self, record)
                if self.soundness.since == self.step:
                    self.events.write("nonfinite", step=self.step, text=self.soundness.warning())
                wanted = self.control.take_save_request() or self._due(self.config.checkpoint.every)
                if self.soundness.hopeless:
                    self.control.finish(1)
                elif self._stopping:
                    self.control.finish(130)
                elif self.control.status == 0 and wanted:
                    self.save()
                self.checkpoints.poll()
                self.pulse.complete_step(self.step, self.checkpoints.durable)
            if self.control.status != 3:
                self._save_last()
            status = self.control.status
        finally:
            for hook in started:
                hook.on_train_end(self, status)
            self.checkpoints.close()
            self.batch_source.close()
            self.events.close()
        return status

    def train_step(self) -> dict[str, Any]:
        """One update: batch, forward and backward over all micro-batches, reduce, decide, apply. Returns its record."""
        for hook in self.hooks:
            hook.on_step_start(self)
        started = time.perf_counter()
        self.pulse.enter("data")
        phase = self._enter_phase()
        schedule = compute_phased_learning_rate(self.config.optim, self.spans, self.step, self.total_steps)
        lr = self.lr = schedule * self.control.lr_scale * self.optimizer.lr_factor()
        micro_batches = [self._own_part(batch) for batch in self.batch_source.next()]
        expected = self.objective.expect(phase.global_batch_size, phase.seq_length)

        self.measurement.begin()
        in_all = phase.global_batch_size // self.config.train.micro_batch_size
        self.optimizer.begin_step(len(micro_batches), even=in_all % self.mesh.data.size == 0)
        scale = (1.0 / expected) * self.control.gradient_factor
        reports = self.executor.run(micro_batches, scale, self.pulse.begin_micro_batch)
        self.pulse.enter("reduce")
        self.optimizer.finish_gradients()

        measured = self.measurement.take(reports, lr, expected, self.control.stop_requested)
        self.pulse.enter("update")
        signals, tokens = measured.signals, measured.tokens
        answers = [hook.on_gradients(self, signals) for hook in self.hooks]
        if all(answers):
            self._update(signals, lr, expected / measured.divisor)
            self.balance.update(measured.layers)
        self.step += 1
        if self.soundness.see(self.step, signals, all(answers)):
            self.checkpoints.trust(self.step - 1)
        self.tokens += tokens
        self._stopping = measured.stop
        progress = Progress(
            step=self.step, attempt=self.attempt, tokens=self.tokens, samples=self.batch_source.samples_consumed,
            lr=lr, lr_scale=self.control.lr_scale, applied=all(answers), seconds=time.perf_counter() - started,
        )  # fmt: skip
        self.control.end_step()
        record = {
            **self.records.make(progress, phase, measured),
            **self.balance.describe(measured.layers),
            **self.batch_source.measure(),
        }
        if self._due(self.config.train.eval_every) or self.step == self.total_steps:
            record.update(evaluated := self.evaluate())
            for hook in self.hooks if evaluated else []:
                hook.on_evaluation(self, evaluated)
            if not math.isfinite(record.get("eval/loss", 0.0)):
                self.soundness.doubt(self.step)
        return record

    def evaluate(self) -> dict[str, float]:
        """Mean loss on held-out documents, the same sequences at every call: {"eval/loss": nats a token}."""
        self.pulse.enter("evaluate")
        batches = self.batch_source.evaluation_batches()
        if not batches:
            return {}
        return {"eval/loss": self.evaluator.mean_loss(batches)}

    # ------------------------------------------------------------------------------------------------------ the state
    def boxes(self) -> list[Box]:
        """Every tensor of the run as boxes of global tensors: fp32 weights, the optimizer's moments, the layers' states."""
        return self.optimizer.boxes() + [box for chunk in self.model_chunks for box in state_boxes(chunk)]

    def state_dict(self) -> dict[str, Any]:
        """The rest of the run's state, small and JSON-able, the same on every rank."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            **self.control.state_dict(),
            "attempt": self.attempt,
            "total_steps": self.total_steps,
            "optimizer": self.optimizer.state(),
            "loader": self.batch_source.state_dict(),
            "hooks": collect_states(self.hooks),
        }

    def restore(self, state: dict[str, Any], *, keep: Collection[str] = (), saved: bool = False) -> None:
        """Take back what `state_dict` gave; the tensors of `boxes` have been overwritten before.

        keep: names of hooks whose state stays what it is. saved: the state is that of the run's newest checkpoint.
        """
        self.soundness = Soundness()
        self.step, self.tokens = state["step"], state["tokens"]
        self._saved_step = self.step if saved else -1  # gone back: what was saved at a later step is another run's
        self.control.load_state_dict(state)
        self.attempt = max(self.attempt, state.get("attempt", 0))
        self.optimizer.load_state(state["optimizer"])
        if "loader" in state:  # not where another library's checkpoint was converted: the data begins anew
            self.batch_source.load_state_dict(state["loader"])
        for hook in self.hooks:
            if hook.name not in keep:
                hook.load_state_dict(state_of(hook, state["hooks"]))
        self.optimizer.gather_parameters()
        self.checkpoints.trust(self.step)  # what was saved later counts for nothing any more

    def save(self, *, wait: bool = False) -> None:
        """Checkpoint the run as it stands between two steps, with `wait` until it is durable.

        A state that is not finite is not saved: it would take the place of a good one, and every start would begin with it.
        Errors: CheckpointError with `wait`, where nothing was saved.
        """
        self.pulse.enter("save")
        if self._saved_step != self.step or self.checkpoints.settle() is not None:
            if not self.soundness.confirm(self.boxes(), self.mesh):
                if wait:
                    raise CheckpointError(f"its weights are not finite, since step {self.soundness.since}")
                return
            state = {**self.state_dict(), "config": asdict(self.config)}
            self.checkpoints.save(self.step, self.boxes(), state, take_random_state(), only_finite=True)
            self._saved_step = self.step
            for hook in self.hooks:
                hook.on_checkpoint(self, self.step)
        if wait:
            self.checkpoints.wait()

    def _save_last(self) -> None:
        """The state that the run ends with. Where it is not durable, or no good one, the run has not ended well."""
        unproven = self.soundness.unproven
        advice = self.soundness.advice(self.checkpoints.retention.trusted)
        try:
            self.save(wait=True)
        except CheckpointError as error:
            kept = self.checkpoints.durable
            newest = "there is no checkpoint" if kept is None else f"the newest checkpoint is of step {kept}"
            mended = advice if unproven else "When the cause is mended, the same command goes on from there."
            self._fail("unsaved", f"the state of step {self.step} is not saved ({error}); {newest}. {mended}")
            return
        if unproven:
            self._fail("nonfinite", f"the loss or gradient at step {self.step} is not finite. {advice}")
        else:
            self.checkpoints.trust(self.step)

    def _fail(self, kind: str, reason: str) -> None:
        """End with status 1, and say why."""
        self.control.finish(1, reason)
        self.events.write(kind, step=self.step, reason=reason)

    # ------------------------------------------------------------------------------------------------------ details
    def _enter_phase(self) -> Phase:
        """The phase that the next update belongs to; its first update is an event."""
        phase = self.batch_source.phase
        self.executor.set_seq_length(find_local_seq_length(self.config, self.mesh, phase.seq_length))
        if phase.name and phase.first_step == self.step:
            shares = {name: phase.share(name) for name in phase.weights}
            self.events.write(
                "phase", step=self.step + 1, name=phase.name, seq_length=phase.seq_length,
                global_batch_size=phase.global_batch_size, shares=shares,
            )  # fmt: skip
        return phase

    def _own_part(self, batch: Batch) -> Batch:
        """The batch on this rank's device, cut to the positions that its context rank computes."""
        whole = batch.to(self.mesh.device).look_ahead(self.config.model.prediction.depth)
        return shard_batch(whole, self.mesh.context)

    def _update(self, signals: Signals, lr: float, token_scale: float) -> None:
        """Apply the gradients, clipped; what the configuration does to weights and moments beside it."""
        limit = self.config.optim.qk_clip
        if limit and signals.attention_logit is not None and signals.attention_logit > limit:
            self.logit_clip.apply(self.measurement.head_logits(), limit)
        self.optimizer.step(lr, grad_scale=token_scale * self.optimizer.clip_factor(signals.grad_norm))
        if self.optimizer.rewarming.due(self.optimizer.step_count):
            self.optimizer.reset_moments()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0
