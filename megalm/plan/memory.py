"""Bytes that each rank of each pipeline stage needs, part by part."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from heapq import heapify, heapreplace
from math import ceil, prod
from typing import Any

from megalm.architecture.kept import cache_by_model
from megalm.architecture.layers import LayerSpec, find_shared_layer
from megalm.architecture.shape import ModelShape, shape_of
from megalm.architecture.tensors import describe_embedding_tensor, list_back_tensors, list_front_tensors
from megalm.config import Config, ModelConfig, ParallelConfig
from megalm.pipeline.actions import Placement
from megalm.pipeline.partition import count_layer_costs
from megalm.plan.activations import count_mask_bytes, estimate_layer_activations
from megalm.plan.layout import BYTES, Layout, layout_of
from megalm.plan.machine import Machine, find_machine

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
    layout = layout_of(config, machine.gpus)
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
    counts = layers_of_ranks(model, layout)
    ends_together = layout.schedule in V_SCHEDULES and layout.pipeline > 1
    distinct: dict[tuple[int, bool, bool, int], StageMemory] = {}
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


@lru_cache(maxsize=4096)
def _cut(layers: int, stages: int, first: float, last: float) -> tuple[int, ...]:
    """Layers of each stage when the ends carry `first` and `last` layers' worth of other work.

    The next layer always goes to the cheapest stage so far (the earliest of equals): that keeps both the most expensive
    stage and the sum of squares smallest, the cut that `megalm.pipeline.partition` makes.
    """
    costs = [(1.0 + (first if i == 0 else 0.0) + (last if i == stages - 1 else 0.0), i) for i in range(stages)]
    counts = [1] * stages
    heapify(costs)
    for _ in range(layers - stages):
        cost, index = costs[0]
        counts[index] += 1
        heapreplace(costs, (cost + 1.0, index))
    return tuple(counts)


def layers_of_stages(model: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, cut by cost: the logits count on the last one."""
    costs = count_layer_costs(model)
    layer = costs.layers[0]
    return _cut(model.num_layers, stages, costs.embedding / layer, costs.output / layer)


def layers_of_ranks(model: ModelConfig, layout: Layout) -> list[int]:
    """Layers of each pipeline rank, over all its chunks."""
    cut = layers_of_stages(model, layout.pipeline * layout.virtual)
    where = Placement(layout.pipeline, layout.virtual, "v" if layout.schedule in V_SCHEDULES else "loop")
    return [sum(cut[stage] for stage in where.of_rank(rank)) for rank in range(layout.pipeline)]


V_SCHEDULES = ("zb-v", "dualpipe-v")
"""Schedules whose first and last stage share a rank."""


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


@dataclass(frozen=True, eq=False)
class Pieces:
    """The model, as one stage's parameters are counted from it. Equal models have the same one: see `pieces_of`."""

    shape: ModelShape
    layer: LayerSpec

    def held(self, layers: int, first: bool, last: bool, tensor: int, expert: int) -> float:
        """Parameters that one rank of a stage with so many layers holds."""
        kv_heads = self.layer.attention.num_kv_heads
        pieces = [(name, full, layers) for name, full in self.layer.list_tensors()]
        if first:
            pieces += [(name, full, 1) for name, full in list_front_tensors(self.shape)]
        if last:
            pieces += [(name, full, 1) for name, full in list_back_tensors(self.shape)]
        if last and not first and self.shape.tie_embeddings:
            pieces.append((*describe_embedding_tensor(self.shape), 1))
        return sum(prod(shard_shape(kv_heads, name, full, tensor, expert)) * times for name, full, times in pieces)


@cache_by_model
def pieces_of(model: ModelConfig) -> Pieces:
    """Resolve a model whose layers are alike."""
    return Pieces(shape_of(model), find_shared_layer(model))


@lru_cache(maxsize=4096)
def count_local_parameters(pieces: Pieces, layers: int, first: bool, last: bool, tensor: int, expert: int) -> float:
    """What `Pieces.held` counts, counted once."""
    return pieces.held(layers, first, last, tensor, expert)


def shard_shape(kv: int, name: str, shape: tuple[int, ...], tensor: int, expert: int) -> tuple[float, ...]:
    """Shape of one rank's share of a tensor, with `kv` key/value heads; experts count by their share of their axis."""
    if ".experts." in name:
        share = (shape[0] / tensor if len(shape) > 1 or ".down." not in name else shape[0],)
        return (share[0] / expert, *shape[1:])
    if tensor == 1:
        return shape
    if name in ("embedding.weight", "output.weight"):
        return (ceil(shape[0] / tensor), *shape[1:])
    # Heads that do not divide are dealt out: the fullest rank's share.
    heads = ceil(kv / tensor) / kv if kv >= tensor else 1 / tensor
    if ".key." in name or ".value." in name:
        return (shape[0] * max(heads, 1 / kv), *shape[1:])
    if ".query." in name:
        return (shape[0] * heads, *shape[1:])
    if name.endswith("attention.output.weight"):
        return (shape[0], shape[1] * heads)
    if ".gate." in name or ".up." in name:
        return (shape[0] / tensor, *shape[1:])
    if name.endswith("down.weight"):
        return (shape[0], shape[1] / tensor)
    return shape


def _stage(
    model: ModelConfig,
    layout: Layout,
    stage: int,
    place: tuple[int, bool, bool, int],
    cpu: bool,
    bucket: float,
    snapshots: int,
) -> StageMemory:
    layers, first, last, flight = place
    size = BYTES[layout.dtype]
    pieces = pieces_of(model)
    held = count_local_parameters(pieces, layers, first, last, layout.tensor, layout.expert)
    shards = layout.shards
    gathered = 0.0
    if layout.fully_shard:
        one_layer = count_local_parameters(pieces, 1, False, False, layout.tensor, layout.expert)
        weights, gradients, optimizer = 4.0 * held / shards, 4.0 * held / shards, 4.0 * layout.states * held / shards
        gathered = 2 * one_layer * size + one_layer * 4.0
        if first or last:
            gathered += model.vocab_size * model.hidden_size * size / layout.tensor
    else:
        weights = float(size * held)
        master = 4.0 if layout.dtype != "fp32" else 0.0
        optimizer = (4.0 * layout.states + master) * held / (shards if layout.zero_stage else 1)
        gradients = 4.0 * held / (shards if layout.zero_stage >= 2 else 1)
        if layout.zero_stage and shards > 1:
            gradients += 4.0 * held / shards if layout.zero_stage == 1 else min(2 * bucket, 4.0 * held)
    acts = estimate_layer_activations(model, layout, cpu=cpu)
    tokens = model.seq_length * layout.micro_batch / layout.context
    stream = tokens * model.hidden_size * size / (layout.tensor if layout.sequence else 1)
    activations = acts.total * layers / layout.virtual * flight + count_mask_bytes(model, layout)
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
    # The loss and a layer's backward follow each other: the larger of the two decides.
    working = max(0.0, acts.recomputed + acts.working - logits)
    communication = gathered
    if layout.data * layout.context > 1 and not layout.fully_shard:
        communication += 2 * bucket
    if layout.tensor > 1:
        communication += tokens * model.hidden_size * size
    if layout.pipeline > 1:
        communication += 2 * stream
    dynamic = activations + logits + working + communication
    saved = 4.0 * (1 + layout.states) * held
    state = saved / (shards if layout.zero_stage or layout.fully_shard else 1)
    # On a CPU the C library's allocator breaks the largest freed block up for smaller ones: the second step takes another.
    largest = at_once * columns * size if last else 0.0
    runtime = CPU_RUNTIME_BYTES + largest if cpu else RUNTIME_BYTES + FRAGMENTATION * dynamic
    return StageMemory(
        stage=stage,
        layers=layers,
        parameters=round(held),
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
        saving=saved / (layout.data * layout.context) if cpu else 0.0,
        host_snapshots=snapshots * state,
    )
