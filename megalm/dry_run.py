"""A run of any size on paper: each pipeline stage is built and stepped on the meta device, where nothing is allocated.

The ranks exist only in torch's fake process group, whose collectives return at once; what they would have sent is counted,
and what autograd would have kept is added up. So the figures are the engine's own, not a formula's.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalm import ops
from megalm.build import build_chunks, local_seq_length, schedule_of
from megalm.config import Config
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.parallel.collectives import count_bytes
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.pipeline.schedule import Schedule
from megalm.pipeline.simulate import Costs, check, simulate

GIB = 2**30
FP32 = 4


@dataclass(frozen=True)
class StageFigures:
    """What each rank of one pipeline stage holds and sends."""

    stage: int
    layers: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Kept for backward at the schedule's peak."""
    in_flight: int
    """Micro-batches (of one chunk) whose activations are held at that peak."""
    sent_bytes: dict[str, float]
    """Bytes that a rank sends in a step, by mesh axis."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True)
class DryRun:
    """The run on paper."""

    world_size: int
    stages: list[StageFigures]
    schedule: Schedule
    bubble: float
    seconds: float
    """What this took."""

    def __rich__(self) -> Table:
        axes = [
            axis
            for axis in ("tensor", "context", "data", "pipeline")
            if any(s.sent_bytes.get(axis) for s in self.stages)
        ]
        title = (
            f"each rank of {self.world_size:,}, by pipeline stage (GiB; built and stepped on the meta device in "
            f"{self.seconds:.0f} s)"
        )
        where = self.schedule.placement
        caption = (
            f"schedule {self.schedule.kind}: {where.ranks} ranks x {where.chunks} chunks, {self.schedule.micro_batches} "
            f"micro-batches, complete and free of deadlock, bubble {100 * self.bubble:.1f}% (backward = 2 forward)"
        )
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        held = "stage,layers,parameters,weights,gradients,optimizer,activations,in flight,sum"
        for name in [*held.split(","), *(f"sent: {axis}" for axis in axes)]:
            table.add_column(name, justify="right")
        for figures in self.stages:
            sizes = (figures.weight_bytes, figures.gradient_bytes, figures.optimizer_bytes, figures.activation_bytes)
            table.add_row(
                str(figures.stage),
                str(figures.layers),
                f"{figures.parameters:,}",
                *(f"{size / GIB:.2f}" for size in sizes),
                str(figures.in_flight),
                f"{figures.total_bytes / GIB:.2f}",
                *(f"{figures.sent_bytes.get(axis, 0.0) / GIB:.2f}" for axis in axes),
            )
        return table


def describe_ranks(config: Config) -> DryRun:
    """Build, check and simulate the resolved configuration without memory or processes.

    Errors: ConfigError for a layout that cannot be built.
    """
    assert config.world_size is not None and isinstance(config.parallel.data, int)
    begun = time.perf_counter()
    schedule = schedule_of(config, config.parallel.data)
    check(schedule)
    simulation = simulate(schedule, Costs())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    try:
        first = build_mesh(config.parallel, "cpu")
        stages = [
            _stage(config, replace(first, pipeline=replace(first.pipeline, rank=rank)), schedule, peak)
            for rank, peak in enumerate(simulation.peak_activations)
        ]
    finally:
        dist.destroy_process_group()
    return DryRun(config.world_size, stages, schedule, simulation.bubble_fraction, time.perf_counter() - begun)


def _stage(config: Config, mesh: Mesh, schedule: Schedule, peak: int) -> StageFigures:
    """The figures of the ranks at one place of the pipeline."""
    chunks = build_chunks(config, mesh, device="meta")
    unique = {id(p): p for chunk in chunks for p in chunk.parameters()}
    parameters = sum(p.numel() for p in unique.values())
    weights = sum(p.numel() * p.element_size() for p in unique.values())
    narrow = config.precision.dtype != "fp32"
    shards = mesh.data_context.size if config.parallel.zero_stage else 1
    moments = 2 + narrow  # fp32 masters are the weights themselves in fp32
    sent: dict[str, float] = {}
    kept = 0
    for chunk in chunks:
        chunk_kept, chunk_sent = _step_on_paper(config, mesh, chunk)
        kept = max(kept, chunk_kept)
        for axis, count in chunk_sent.items():
            sent[axis] = sent.get(axis, 0.0) + count * schedule.micro_batches
    replicas = mesh.data_context.size
    gradients = parameters * FP32
    if replicas > 1:
        # an all-reduce, or a reduce-scatter of the gradients and an all-gather of the weights
        gathered = weights if shards > 1 else gradients
        sent["data"] = sent.get("data", 0.0) + (gradients + gathered) * (replicas - 1) / replicas
    boundary = local_seq_length(config, mesh) * config.train.micro_batch_size * config.model.hidden_size
    where = schedule.placement
    messages = 0
    for stage in where.of_rank(mesh.pipeline.rank):
        for other in (stage - 1, stage + 1):
            if 0 <= other < where.stages and where.rank(other) != mesh.pipeline.rank:
                messages += schedule.micro_batches
    element = 2 if narrow else FP32
    if messages:
        sent["pipeline"] = float(messages * boundary * element)
    return StageFigures(
        stage=mesh.pipeline.rank,
        layers=sum(len(chunk.layers) for chunk in chunks),
        parameters=parameters,
        weight_bytes=weights,
        gradient_bytes=gradients // (shards if config.parallel.zero_stage == 2 else 1),
        optimizer_bytes=parameters * FP32 * moments // shards,
        activation_bytes=kept * peak,
        in_flight=peak,
        sent_bytes=sent,
    )


def _step_on_paper(config: Config, mesh: Mesh, chunk: Transformer) -> tuple[int, dict[str, float]]:
    """One forward and backward pass of one micro-batch: (bytes that autograd keeps, bytes sent by axis)."""
    rows, length = config.train.micro_batch_size, config.model.seq_length // mesh.context.size
    tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
    batch = Batch(tokens, tokens)
    shape = (local_seq_length(config, mesh), rows, config.model.hidden_size)
    dtype = next(chunk.parameters()).dtype
    hidden = None if chunk.first else torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    owned = {p.untyped_storage()._cdata for p in chunk.parameters()}
    owned |= {buffer.untyped_storage()._cdata for buffer in chunk.buffers()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with ops.use_backend("reference"), count_bytes() as counted:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = chunk(hidden, batch)
        objective = output[0] if isinstance(output, tuple) else output.sum()
        objective.backward()
    sent: dict[str, float] = {}
    for (_, axis), count in counted.bytes.items():
        sent[axis] = sent.get(axis, 0.0) + count
    return sum(sizes.values()), sent
