"""The whole plan of a run on one screen: what, where, how long, how much, what will fail how often."""

from dataclasses import dataclass
from typing import Any

from megalm.architecture import flops
from megalm.architecture.tensors import ParameterCounts, count_parameters
from megalm.config import Config
from megalm.plan import cost
from megalm.plan.goodput import Goodput, estimate_goodput
from megalm.plan.layout import Layout, read_layout
from megalm.plan.machine import Machine, find_machine
from megalm.plan.memory import MemoryEstimate, estimate
from megalm.plan.time import PARTS as TIME_PARTS
from megalm.plan.time import StepTime, estimate_step_time


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts."""

    name: str
    machine: Machine
    layout: Layout
    counts: ParameterCounts
    seq_length: int
    steps: int | None
    memory: MemoryEstimate
    time: StepTime
    flops_per_token: float
    hardware_flops_per_token: float
    peak: float
    losses: Goodput

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.layout.global_batch * self.seq_length

    @property
    def tokens(self) -> float | None:
        """Tokens of the run."""
        return None if self.steps is None else float(self.steps) * self.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0..1."""
        return flops.compute_utilisation(self.flops_per_token, self.tokens_per_second, self.layout.world, self.peak)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, 0..1."""
        return flops.compute_utilisation(
            self.hardware_flops_per_token, self.tokens_per_second, self.layout.world, self.peak
        )

    @property
    def training_seconds(self) -> float | None:
        """Without failures."""
        return None if self.steps is None else self.steps * self.time.total

    @property
    def days(self) -> float | None:
        """Wall clock with the losses to failures."""
        seconds = self.training_seconds
        return None if seconds is None else seconds / 86400.0 / max(self.losses.effective, 1e-9)

    @property
    def dollars(self) -> float | None:
        """GPU-hours of the wall clock; None without a price or a length."""
        if self.days is None or self.machine.price is None:
            return None
        return cost.price_gpus(self.layout.world, self.days, self.machine.price)

    def as_dict(self) -> dict[str, Any]:
        """The content of plan.json, units in the keys."""
        seconds = self.training_seconds
        failures = None if self.days is None else self.days * 86400.0 / self.losses.mtti
        return {
            "model": self.name,
            "parameters": self.counts.total,
            "active_parameters": self.counts.active,
            "embedding_parameters": self.counts.embedding,
            "machine": self.machine.describe(),
            "gpu": self.machine.accelerator.name,
            "gpus": self.layout.world,
            "layout": self.layout.as_dict(),
            "seq_length": self.seq_length,
            "global_batch_size": self.layout.global_batch,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_parameter": None if self.tokens is None else self.tokens / self.counts.active,
            "flops_per_token": self.flops_per_token,
            "hardware_flops_per_token": self.hardware_flops_per_token,
            "model_flops_per_step": self.flops_per_token * self.tokens_per_step,
            "hardware_flops_per_step": self.hardware_flops_per_token * self.tokens_per_step,
            "peak_flops_per_second_per_gpu": self.peak,
            "bytes_per_gpu": round(self.memory.bytes_per_gpu),
            "bytes_available_per_gpu": round(self.machine.memory),
            "memory": self.memory.as_dict(),
            "step_seconds": self.time.total,
            "time": self.time.as_dict(),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "training_seconds": seconds,
            "days": self.days,
            "dollars": self.dollars,
            "dollars_per_gpu_hour": self.machine.price,
            "price_source": self.machine.price_source,
            "checkpoint_bytes": round(4.0 * (1 + self.layout.states) * self.counts.total),
            "expected_failures": failures,
            "goodput": self.losses.as_dict(),
        }

    def measured_beside(self, measured: dict[str, float]) -> list[tuple[str, float, float, float]]:
        """(name, planned, measured, measured / planned) for each measured key that the plan has."""
        planned = self.as_dict()
        rows = []
        for name, value in measured.items():
            expected = planned.get(name)
            if isinstance(expected, (int, float)) and not isinstance(expected, bool) and expected:
                rows.append((name, float(expected), float(value), float(value) / float(expected)))
        return rows


def plan(config: Config, machine: Machine | None = None) -> Plan:
    """Work out everything about a run; ConfigError where the layout cannot be."""
    machine = machine or find_machine(config)
    layout = read_layout(config, machine.gpus)
    model = config.model
    counts = count_parameters(model)
    tokens_per_step = layout.global_batch * model.seq_length
    steps = config.train.steps
    if steps is None and config.train.tokens:
        steps = max(1, round(config.train.tokens / tokens_per_step))
    seconds = estimate_step_time(model, layout, machine)
    stall = estimate_checkpoint_stall(counts.total, layout, machine)
    losses = estimate_goodput(
        layout.world,
        machine.failures_per_1000_gpu_days,
        stall=stall,
        gpus_per_node=min(machine.accelerator.gpus_per_node, layout.world),
    )
    return Plan(
        name=model.name,
        machine=machine,
        layout=layout,
        counts=counts,
        seq_length=model.seq_length,
        steps=steps,
        memory=estimate(config, machine),
        time=seconds,
        flops_per_token=flops.count_flops_per_token(model),
        hardware_flops_per_token=flops.count_hardware_flops_per_token(model, recompute=layout.recompute),
        peak=machine.peak(layout.dtype),
        losses=losses,
    )


SAVE_SECONDS = 1.0
"""What a save costs beside its bytes: a barrier, pinning, handing over to the writer; published asynchronous saves take
0.2 to 2 seconds."""


def estimate_checkpoint_stall(total_parameters: int, layout: Layout, machine: Machine) -> float:
    """Estimate seconds that the step waits for an asynchronous save: ranks meet, and copy their shares to host memory."""
    holders = layout.world if layout.zero_stage or layout.fully_shard else layout.tensor * layout.pipeline
    return SAVE_SECONDS + 4.0 * (1 + layout.states) * total_parameters / holders / machine.accelerator.host_bandwidth


def list_time_shares(seconds: StepTime) -> list[tuple[str, float]]:
    """(part, share of the step), largest first."""
    parts = [(part, getattr(seconds, part) / seconds.total) for part in TIME_PARTS]
    return sorted((part for part in parts if part[1] > 0), key=lambda part: -part[1])


__all__ = ["Plan", "estimate_checkpoint_stall", "plan", "list_time_shares"]
