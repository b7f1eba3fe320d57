"""A step's record: the numbers that become its line of metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megalm.architecture.flops import count_flops_per_token, count_hardware_flops_per_token
from megalm.config import Config
from megalm.data.phases import Phase
from megalm.train.measure import Measured


@dataclass(frozen=True)
class Progress:
    """Where the run stands when a step is made."""

    step: int
    attempt: int
    tokens: int
    samples: int
    lr: float
    lr_scale: float
    applied: bool
    """Whether the update was made; a hook may have refused it."""
    seconds: float
    """Time that the step took."""


class StepRecords:
    """Makes the records of a run.

    Args:
        world_size: ranks that share the work.
        peak_flops: of one device, by which utilisation is told; None: it is not known.
    """

    def __init__(self, config: Config, world_size: int, peak_flops: float | None) -> None:
        self.config, self.world_size, self.peak_flops = config, world_size, peak_flops
        self._flops: dict[int, tuple[float, float]] = {}  # by sequence length: of the model, of the hardware, a token

    def make(self, progress: Progress, phase: Phase, measured: Measured) -> dict[str, Any]:
        """Make the record of a step of this phase; hooks and an evaluation may add to it."""
        signals = measured.signals
        speed = measured.tokens / progress.seconds
        model_flops, hardware_flops = self._flops_per_token(phase.seq_length)
        record: dict[str, Any] = {
            "step": progress.step,
            "loss": signals.loss,
            "grad_norm": signals.grad_norm,
            "lr": progress.lr,
            "lr_scale": progress.lr_scale,
            "attempt": progress.attempt,
            "tokens": progress.tokens,
            "samples": progress.samples,
            "step_time_s": progress.seconds,
            "tokens_per_s": speed,
            "mfu": self._utilisation(model_flops, speed),
            "hfu": self._utilisation(hardware_flops, speed),
            "loss_scale": 1.0,
            "skipped": int(not progress.applied),
        }
        if phase.name:
            record["phase"] = phase.name
        record.update(measured.means)
        record.update({f"loss/{name}": loss for name, loss in measured.source_losses.items()})
        record.update({f"prediction/{depth}/loss": loss for depth, loss in measured.prediction_losses.items()})
        for name in ("update_rms", "attention_logit", "loss_spread"):
            if (value := getattr(signals, name)) is not None:
                record[name] = value
        return record

    def _flops_per_token(self, seq_length: int) -> tuple[float, float]:
        if seq_length not in self._flops:
            model = replace(self.config.model, seq_length=seq_length)
            recompute = self.config.parallel.recompute
            self._flops[seq_length] = (
                count_flops_per_token(model),
                count_hardware_flops_per_token(model, recompute=recompute),
            )
        return self._flops[seq_length]

    def _utilisation(self, flops_per_token: float, tokens_per_s: float) -> float | None:
        if self.peak_flops is None:
            return None
        return flops_per_token * tokens_per_s / (self.peak_flops * self.world_size)
