"""The training run, readable top to bottom: build, resume, step, evaluate, save. Everything else hooks in."""

import math
import os
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.architecture.flops import flops_per_token, hardware_flops_per_token
from megalm.checkpoint import Checkpointer, CheckpointError
from megalm.checkpoint.random_state import random_state, restore_random_state
from megalm.config import Config, ConfigError
from megalm.config.phases import spans_of
from megalm.data.batch import Batch
from megalm.data.loader import Loader
from megalm.data.phases import Phase
from megalm.journal import EventLog
from megalm.objectives.objective import Objective
from megalm.optim import build_optimizer
from megalm.optim.logit_clip import LogitClip
from megalm.optim.lr import phased_learning_rate
from megalm.parallel.context import shard_batch
from megalm.parallel.mesh import Mesh
from megalm.parallel.random import seed_of, seed_ranks
from megalm.parallel.slices import Box
from megalm.pipeline.execute import Executor
from megalm.train.build import DTYPES, build_chunks, build_objective, local_seq_length, schedule_of
from megalm.train.earlier import check_place, make_way
from megalm.train.hooks import Hook
from megalm.train.mean_loss import Evaluator
from megalm.train.measure import Measurement
from megalm.train.resume import Origin, SettingsCheck, changes_event
from megalm.train.signals import Signals
from megalm.train.soundness import Soundness


class Trainer:
    """One run on this rank.

    `step` counts completed updates (refused ones too); `tokens` the tokens of the batches they consumed. After `train()`
    returns 0 the run is complete and saved, 130 it was interrupted and saved, 3 a hook gave up, 1 it ended otherwise
    (`reason`).
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        folder: Path,
        *,
        objective: Objective | None = None,
        peak_flops: float | None = None,
    ) -> None:
        assert config.train.steps is not None
        self.config, self.mesh, self.folder = config, mesh, folder
        self.total_steps = config.train.steps
        self.peak_flops = peak_flops
        self.step = 0
        self.tokens = 0
        self.lr = 0.0  # of the update under way
        self.lr_scale = 1.0
        self.attempt = 0  # times that the run went back; steps of metrics.jsonl are made again with a higher number
        self.status = 0
        self.reason: str | None = None  # why it ended with status 1
        self.stop_requested = False  # set from outside, on any rank, at any moment
        self._stopping = False  # what the ranks agreed on in the last step
        self._saved_step = 0
        self.soundness = Soundness()
        self.origin: Origin | None = None  # what it began with
        self.environment: dict[str, object] = {}  # what it runs on, for the event of its start
        self.hooks: list[Hook] = []
        self.is_writer = mesh.rank == 0
        self.events = EventLog(folder / "events.jsonl", writes=self.is_writer)
        self.events_before = self.events.path.stat().st_size if self.is_writer else 0  # bytes of a former process

        _seed_everything(config.train.seed, mesh)
        choose_algorithms(config.train.deterministic, mesh.device)
        self.objective = objective or build_objective(config)
        self.model_chunks = build_chunks(config, mesh, self.objective)
        self.optimizer = build_optimizer(self.model_chunks, config.optim, config.precision, mesh, config.parallel)
        self.executor = Executor(
            self.model_chunks,
            schedule_of(config, mesh.data.size),
            mesh.pipeline,
            micro_batch_size=config.train.micro_batch_size,
            seq_length=local_seq_length(config, mesh),
            hidden_size=config.model.hidden_size,
            dtype=DTYPES[config.precision.dtype],
            device=mesh.device,
            split_backward=config.parallel.data_mode != "fully_shard",  # weights are whole only during backward
        )
        self.loader = Loader(config, mesh.data)
        names = [source.name for source in self.loader.sources]
        self.measurement = Measurement(config, mesh, self.model_chunks, self.optimizer, self.objective, names)
        length = local_seq_length(config, mesh)
        self.evaluator = Evaluator(self.executor, self.measurement.sums, self.objective.divisor, mesh, length)
        self.logit_clip = LogitClip(self.measurement.attention, self.boxes() if config.optim.qk_clip else [], mesh)
        self.spans = spans_of(config)
        self.checkpoints = Checkpointer(
            config.checkpoint.path or folder / "checkpoints", config.checkpoint, mesh, events=self.events.write
        )
        self._flops: dict[int, tuple[float, float]] = {}  # by sequence length: of the model, of the hardware, a token

    # ------------------------------------------------------------------------------------------------------ the run
    def train(self) -> int:
        """Go on from where the run stands to its last step; returns the exit status.

        Where nothing is left to train, nothing is written: the folder stays the record of what was trained.
        """
        status, started = 1, []
        try:
            self.origin = self._resume()
            for hook in self.hooks:
                hook.on_resume(self)
            if self.step >= self.total_steps:
                for hook in self.hooks:
                    hook.on_complete(self)
                status = 0
                return status
            self._tell_origin()
            for hook in self.hooks:
                hook.on_train_start(self)
                started.append(hook)
            while self.step < self.total_steps and self.status == 0:
                self._notify(self.train_step())
                if self.soundness.since == self.step:
                    self.events.write("nonfinite", step=self.step, text=self.soundness.warning())
                if self.soundness.hopeless:
                    self.status = 1
                elif self._stopping:
                    self.status = 130
                elif self.status == 0 and self._due(self.config.checkpoint.every):
                    self.save()
                self.checkpoints.poll()
            if self.status != 3:
                self._save_last()
            status = self.status
        finally:
            for hook in started:
                hook.on_train_end(self, status)
            self.checkpoints.close()
            self.loader.close()
            self.events.close()
        return status

    def train_step(self) -> dict[str, Any]:
        """One update: batch, forward and backward over all micro-batches, reduce, decide, apply. Returns its record."""
        for hook in self.hooks:
            hook.on_step_start(self)
        started = time.perf_counter()
        phase = self._enter_phase()
        schedule = phased_learning_rate(self.config.optim, self.spans, self.step, self.total_steps)
        lr = self.lr = schedule * self.lr_scale * self.optimizer.lr_factor()
        micro_batches = [self._own_part(batch) for batch in self.loader.next()]
        expected = self.objective.expect(phase.global_batch_size, phase.seq_length)

        self.measurement.begin()
        self.optimizer.begin_step(len(micro_batches))
        reports = self.executor.run(micro_batches, scale=1.0 / expected)
        self.optimizer.finish_gradients()

        measured = self.measurement.take(reports, lr, expected, self.stop_requested)
        signals, tokens = measured.signals, measured.tokens
        answers = [hook.on_gradients(self, signals) for hook in self.hooks]
        if all(answers):
            self._update(signals, lr, expected / measured.divisor)
        self.step += 1
        if self.soundness.see(self.step, signals, all(answers)):
            self.checkpoints.trust(self.step - 1)
        self.tokens += tokens
        self._stopping = measured.stop
        elapsed = time.perf_counter() - started
        model_flops, hardware_flops = self._flops_per_token(phase.seq_length)
        record: dict[str, Any] = {
            "step": self.step,
            "loss": signals.loss,
            "grad_norm": signals.grad_norm,
            "lr": lr,
            "lr_scale": self.lr_scale,
            "attempt": self.attempt,
            "tokens": self.tokens,
            "samples": self.loader.samples_consumed,
            "step_time_s": elapsed,
            "tokens_per_s": tokens / elapsed,
            "mfu": self._utilisation(model_flops, tokens / elapsed),
            "hfu": self._utilisation(hardware_flops, tokens / elapsed),
            "loss_scale": 1.0,
            "skipped": int(not all(answers)),
        }
        if phase.name:
            record["phase"] = phase.name
        record.update(measured.means)
        record.update({f"loss/{name}": loss for name, loss in measured.source_losses.items()})
        for name in ("update_rms", "attention_logit", "loss_spread"):
            if (value := getattr(signals, name)) is not None:
                record[name] = value
        if self._due(self.config.train.eval_every) or self.step == self.total_steps:
            record.update(self.evaluate())
            if not math.isfinite(record.get("eval/loss", 0.0)):
                self.soundness.doubt(self.step)
        return record

    def evaluate(self) -> dict[str, float]:
        """Mean loss on held-out documents, the same sequences at every call: {"eval/loss": nats a token}."""
        batches = self.loader.evaluation_batches()
        if not batches:
            return {}
        return {"eval/loss": self.evaluator.mean_loss(batches)}

    # ------------------------------------------------------------------------------------------------------ the state
    def boxes(self) -> list[Box]:
        """Every tensor of the run as boxes of global tensors: fp32 weights and the optimizer's moments."""
        return self.optimizer.boxes()

    def state_dict(self) -> dict[str, Any]:
        """The rest of the run's state, small and JSON-able, the same on every rank."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "lr_scale": self.lr_scale,
            "attempt": self.attempt,
            "total_steps": self.total_steps,
            "optimizer": self.optimizer.state(),
            "loader": self.loader.state_dict(),
            "hooks": {type(hook).__name__: state for hook in self.hooks if (state := hook.state_dict())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the tensors of `boxes` have been overwritten before."""
        self.soundness = Soundness()
        self._saved_step = -1  # gone back: what was saved at a later step is another run's
        self.step, self.tokens, self.lr_scale = state["step"], state["tokens"], state["lr_scale"]
        self.attempt = max(self.attempt, state.get("attempt", 0))
        self.optimizer.load_state(state["optimizer"])
        if "loader" in state:  # not where another library's checkpoint was converted: the data begins anew
            self.loader.load_state_dict(state["loader"])
        for hook in self.hooks:
            hook.load_state_dict(state["hooks"].get(type(hook).__name__, {}))
        self.optimizer.gather_parameters()
        self.checkpoints.trust(self.step)  # what was saved later counts for nothing any more

    def save(self, *, wait: bool = False) -> None:
        """Checkpoint the run as it stands between two steps, with `wait` until it is durable.

        A state that is not finite is not saved: it would take the place of a good one, and every start would begin with it.
        Errors: CheckpointError with `wait`, where nothing was saved.
        """
        if self._saved_step != self.step or self.checkpoints.settle() is not None:
            if not self.soundness.confirm(self.boxes(), self.mesh):
                if wait:
                    raise CheckpointError(f"its weights are not finite, since step {self.soundness.since}")
                return
            state = {**self.state_dict(), "config": asdict(self.config)}
            self.checkpoints.save(self.step, self.boxes(), state, random_state(), only_finite=True)
            self._saved_step = self.step
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
        self.status, self.reason = 1, reason
        self.events.write(kind, step=self.step, reason=reason)

    def _resume(self) -> Origin | None:
        """Take up the run's newest good checkpoint, or what `checkpoint.load_path` is to begin with.

        Errors: ConfigError where none is usable, or it was made with settings that the run may not go on from.
        """
        try:
            check_place(self)
            origin = self._load()
            make_way(self)
            return origin
        except CheckpointError as error:
            raise ConfigError(str(error)) from None

    def _load(self) -> Origin | None:
        options = self.config.checkpoint
        if options.resume and self.checkpoints.latest() is not None:
            origin = self._take_up(None)
            self._saved_step = self.step
            return origin
        if options.load_path is None:
            return None
        if options.load == "weights":
            check = SettingsCheck(self.config, weights_only=True)
            self.checkpoints.load(self.boxes(), path=options.load_path, weights_only=True, check=check)
            self.optimizer.gather_parameters()
            return check.origin("load_weights", 0, path=options.load_path)
        return self._take_up(options.load_path)

    def _take_up(self, path: str | None) -> Origin:
        """All of the state at `path`, or of the newest checkpoint."""
        check = SettingsCheck(self.config, load=path is not None)
        state, rank_state = self.checkpoints.load(self.boxes(), path=path, check=check)
        self.load_state_dict(state)
        self._restore_random_numbers(rank_state)
        where = {} if path is None else {"path": path}
        return check.origin("resume", self.step, tokens=self.tokens, **where)

    def _tell_origin(self) -> None:
        """Write down that the run begins, from what, and what is set otherwise than before."""
        if self.environment:
            self.events.write("start", step=self.step, **self.environment)
        if self.origin is None:
            return
        self.events.write(self.origin.kind, step=self.origin.step, **self.origin.fields)
        if (changed := changes_event(self.config, self.origin)) is not None:
            self.events.write("changed", step=self.origin.step, **changed)

    def _restore_random_numbers(self, saved: dict[str, Any] | None) -> None:
        """Go on with a rank's streams, or on another layout with new ones: the first ones were used at the first steps."""
        if saved:
            restore_random_state(saved)
        else:
            _seed_everything(seed_of("resume", self.config.train.seed, self.step), self.mesh)

    # ------------------------------------------------------------------------------------------------------ details
    def _enter_phase(self) -> Phase:
        """The phase that the next update belongs to; its first update is an event."""
        phase = self.loader.phase
        self.executor.set_seq_length(local_seq_length(self.config, self.mesh, phase.seq_length))
        if phase.name and phase.first_step == self.step:
            shares = {name: phase.share(name) for name in phase.weights}
            self.events.write(
                "phase", step=self.step + 1, name=phase.name, seq_length=phase.seq_length,
                global_batch_size=phase.global_batch_size, shares=shares,
            )  # fmt: skip
        return phase

    def _flops_per_token(self, seq_length: int) -> tuple[float, float]:
        if seq_length not in self._flops:
            model = replace(self.config.model, seq_length=seq_length)
            recompute = self.config.parallel.recompute
            self._flops[seq_length] = (
                flops_per_token(model),
                hardware_flops_per_token(model, recompute=recompute),
            )
        return self._flops[seq_length]

    def _own_part(self, batch: Batch) -> Batch:
        """The batch on this rank's device, cut to the positions that its context rank computes."""
        return shard_batch(batch.to(self.mesh.device), self.mesh.context)

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

    def _utilisation(self, flops_per_token: float, tokens_per_s: float) -> float | None:
        if self.peak_flops is None:
            return None
        return flops_per_token * tokens_per_s / (self.peak_flops * self.mesh.world_size)

    def _notify(self, record: dict[str, Any]) -> None:
        for hook in self.hooks:
            hook.on_step_end(self, record)


def _seed_everything(seed: int, mesh: Mesh) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_ranks(seed, mesh)


def choose_algorithms(deterministic: bool, device: torch.device) -> None:
    """Whether this process' algorithms give the same bits in every run.

    On a GPU an operation that cannot is then an error: where torch may only warn, its attention computes gradients in
    an order that changes (so it warns in torch 2.11), and a replay of the guard's would find a machine to blame.
    """
    if deterministic and device.type == "cuda":
        # cuBLAS asks for a workspace of its own for each stream, which it reads before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type != "cuda")
    # A debugging aid that costs a write of every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
