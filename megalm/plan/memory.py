"""Bytes that each rank of each pipeline stage needs, part by part."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from megalm.config import Config, ModelConfig, ParallelConfig
from megalm.config.precision import BYTES
from megalm.plan.activations import count_mask_bytes, estimate_layer_activations
from megalm.plan.layout import Layout, read_layout
from megalm.plan.machine import Machine, find_machine
from megalm.plan.stages import V_SCHEDULES, Stack, count_local_parameters, list_rank_stacks, sort_layers, take_one

FRAGMENTATION = 0.03
"""Share of the dynamic memory lost between the allocator's blocks: 2-5% is usual with torch's expandable segments."""
CPU_RUNTIME_BYTES = 45 * 2**20
"""Code of libraries that a CPU run loads when it first needs it, stacks and buffers of threads, objects of Python: 40 to 80
MiB were measured (torch 2.13 on Linux) beyond what the process had taken before the model was built."""
RUNTIME_BYTES = 1.2 * 2**30
"""CUDA context, libraries' workspaces and NCCL's channels of one GPU: 0.8 to 1.5 GiB are usual."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of one pipeline stage."""

    stage: int
    layers: int
    parameters: int
    """Parameters that this rank holds."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for backward, over all micro-batches in flight."""
    logits: float
    """Logits, their gradient and what stands around the loss, on the last stage."""
    working: float
    """What one layer's backward needs beyond the room that the logits left: gradients, recomputed activations."""
    communication: float
    """Buckets, gathered weights and tensors under way."""
    runtime: float
    """Contexts and workspaces of the libraries, and what the allocator cannot use again."""
    in_flight: int
    """Micro-batches (chunks of them) whose activations are held at the peak."""
    snapshots: float = 0.0
    """On a CPU, whose memory is the host's: the guard's snapshots."""
    saving: float = 0.0
    """On a CPU: this rank's share of a checkpoint, which a save copies before it writes."""
    host_snapshots: float = 0.0
    """Host memory of the guard's snapshots."""

    @cached_property
    def total(self) -> float:
        """Bytes on the accelerator."""
        return sum(getattr(self, part) for part in PARTS)

    def as_dict(self) -> dict[str, Any]:
        """With units in the keys."""
        values = asdict(self)
        return {
            **{name: values[name] for name in ("stage", "layers", "parameters", "in_flight")},
            **{f"{name}_bytes": round(values[name]) for name in PARTS},
            "host_snapshots_bytes": round(self.host_snapshots),
            "total_bytes": round(self.total),
        }


PARTS = (
    *("weights", "gradients", "optimizer", "activations", "logits", "working", "communication", "runtime"),
    *("snapshots", "saving"),
)
"""The parts that add up to a rank's memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of every pipeline stage; the fullest one decides whether a layout fits."""

    stages: list[StageMemory]

    @cached_property
    def worst(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bytes_per_gpu(self) -> float:
        """Bytes of the fullest rank."""
        return self.worst.total

    def as_dict(self) -> dict[str, Any]:
        """With units in the keys."""
        return {
            "bytes_per_gpu": round(self.bytes_per_gpu),
            "host_bytes_per_gpu": round(self.worst.host_snapshots),
            "worst_stage": self.worst.stage,
            "stages": [stage.as_dict() for stage in self.stages],
        }


def estimate(config: Config, machine: Machine | None = None) -> MemoryEstimate:
    """Per-rank memory of a configuration's run."""
    machine = machine or find_machine(config)
    layout = read_layout(config, machine.gpus)
    return estimate_layout(
        config.model,
        layout,
        cpu=machine.is_cpu,
        bucket_bytes=config.parallel.bucket_mb * 1e6,
        snapshots=count_guard_snapshots(config),
    )


def count_guard_snapshots(config: Config) -> int:
    """Snapshots that the guard keeps in host memory."""
    guard = config.guard
    lags = getattr(guard, "snapshot_lags", None)
    count = len(lags) if lags is not None else int(getattr(guard, "snapshots", 0) or 0)
    return count if guard.enabled else 0


def estimate_layout(
    model: ModelConfig,
    layout: Layout,
    *,
    cpu: bool = False,
    bucket_bytes: float = 25e6,
    snapshots: int = 0,
    distinct_only: bool = False,
) -> MemoryEstimate:
    """Per-rank memory of a model under a layout, for each pipeline stage (distinct_only: the first of each kind)."""
    counts = list_rank_stacks(model, layout)
    ends_together = layout.schedule in V_SCHEDULES and layout.pipeline > 1
    distinct: dict[tuple[Stack, bool, bool, int], StageMemory] = {}
    stages = []
    for stage, layers in enumerate(counts):
        first = stage == 0
        last = first if ends_together else stage == layout.pipeline - 1
        flight = count_chunks_in_flight(layout, stage)
        key = (layers, first, last, flight)
        if key not in distinct:
            distinct[key] = _stage(model, layout, stage, key, cpu, bucket_bytes, snapshots)
        elif distinct_only:
            continue
        known = distinct[key]
        stages.append(known if known.stage == stage else replace(known, stage=stage))
    return MemoryEstimate(stages)


def count_chunks_in_flight(layout: Layout, rank: int) -> int:
    """Forward passes of one chunk and micro-batch whose activations a rank holds at its peak, by schedule.

    The figures of `megalm.pipeline.simulate` in closed form; one rank holds one micro-batch (all its chunks of it).
    """
    ranks, batches, chunks = layout.pipeline, layout.micro_batches, layout.virtual
    if layout.schedule == "gpipe":
        return batches * chunks
    if layout.schedule == "interleaved":
        groups = max(1, batches // ranks)
        widest = -(-batches // groups)
        return min(2 * (ranks - 1 - rank) + (chunks - 1) * widest + 1, batches * chunks)
    if layout.schedule in V_SCHEDULES:
        most = 2 * ranks + (1 if layout.schedule == "dualpipe-v" else 0)
        return min(batches + 1 + rank, most, 2 * batches)
    if layout.schedule == "zb-h1":
        return min(ranks, batches)
    return min(ranks - rank, batches) * chunks


def _stage(
    model: ModelConfig,
    layout: Layout,
    stage: int,
    place: tuple[Stack, bool, bool, int],
    cpu: bool,
    bucket: float,
    snapshots: int,
) -> StageMemory:
    stack, first, last, flight = place
    size = BYTES[layout.dtype]
    pieces, axes = sort_layers(model), layout.weight_axes
    held = count_local_parameters(pieces, stack, first, last, axes)

    def shared_out(each: float) -> float:
        """Bytes of a rank's share, `each` a parameter, over the ranks that hold the same ones."""
        return each * (held.dense / layout.shards + held.experts / layout.expert_shards)

    gathered = 0.0
    if layout.fully_shard:
        one_layer = max(
            count_local_parameters(pieces, take_one(stack, kind), False, False, axes).total
            for kind in range(len(stack))
        )
        weights, gradients, optimizer = shared_out(4.0), shared_out(4.0), shared_out(4.0 * layout.states)
        gathered = 2 * one_layer * size + one_layer * 4.0
        if first or last:
            gathered += model.vocab_size * model.hidden_size * size / layout.tensor
    else:
        weights = float(size * held.total)
        if layout.narrow.keeps_weights:  # one byte of an element in each orientation
            matrices = count_local_parameters(pieces, stack, False, False, axes).dense
            weights += 2.0 * layout.narrow.share * matrices
        master = 4.0 if layout.dtype != "fp32" else 0.0
        kept = 4.0 * layout.states + master
        optimizer = shared_out(kept) if layout.zero_stage else kept * held.total
        gradients = shared_out(4.0) if layout.zero_stage >= 2 else 4.0 * held.total
        if layout.zero_stage and layout.shards > 1:
            gradients += shared_out(4.0) if layout.zero_stage == 1 else min(2 * bucket, 4.0 * held.total)
    kinds = [
        (estimate_layer_activations(model, layout, layer, cpu=cpu), times)
        for layer, times in zip(pieces.kinds, stack, strict=True)
        if times
    ]
    tokens = model.seq_length * layout.micro_batch / layout.context
    stream = tokens * model.hidden_size * size / (layout.tensor if layout.sequence else 1)
    activations = sum(acts.total * times for acts, times in kinds) / layout.virtual * flight
    activations += count_mask_bytes(model, layout)
    if first:
        activations += 8.0 * tokens * flight
    logits = 0.0
    if last:
        # The last norm's input, its output and a gradient; the logits held at a time, which their gradient is written
        # over; in chunks, the output matrix's gradient is summed aside in fp32.
        columns = ceil(model.vocab_size / layout.tensor)
        at_once = ParallelConfig().loss_positions(int(tokens), columns, size)
        logits = 3 * stream + at_once * columns * size
        if at_once < tokens:
            logits += 4.0 * columns * model.hidden_size
        logits *= 1 + model.prediction.depth  # those of all depths wait for backward
    # The loss and a layer's backward follow each other: the larger of the two decides.
    working = max(0.0, max(acts.recomputed + acts.working for acts, _ in kinds) - logits)
    communication = gathered
    if layout.data * layout.context > 1 and not layout.fully_shard:
        communication += 2 * bucket
    if layout.tensor > 1:
        communication += tokens * model.hidden_size * size
    if layout.pipeline > 1:
        communication += 2 * stream
    dynamic = activations + logits + working + communication
    saved = 4.0 * (1 + layout.states) * held.total
    state = shared_out(4.0 * (1 + layout.states)) if layout.zero_stage or layout.fully_shard else saved
    # On a CPU the C library's allocator breaks the largest freed block up for smaller ones: the second step takes another.
    largest = at_once * columns * size if last else 0.0
    runtime = CPU_RUNTIME_BYTES + largest if cpu else RUNTIME_BYTES + FRAGMENTATION * dynamic
    return StageMemory(
        stage=stage,
        layers=sum(stack),
        parameters=round(held.total),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        working=working,
        communication=communication,
        runtime=runtime,
        in_flight=flight,
        snapshots=snapshots * state if cpu else 0.0,
        saving=shared_out(4.0 * (1 + layout.states)) if cpu else 0.0,
        host_snapshots=snapshots * state,
    )
