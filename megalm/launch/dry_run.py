"""A run of any size on paper: each pipeline stage is built and stepped on the meta device, where nothing is allocated.

The ranks exist only in torch's fake process group, whose collectives return at once; what they would have sent is counted,
and what would have been kept for backward is added up. So the figures are the engine's own, not a formula's.
"""

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.config import Config
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.ops.backend import Paper, use_backend, use_library
from megalm.parallel.collectives import count_bytes
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.parallel.slices import slice_of
from megalm.pipeline.schedule import Schedule
from megalm.pipeline.simulate import Costs, check, simulate
from megalm.plan.layout import count_states
from megalm.train.build import build_chunks, choose_schedule, find_local_seq_length

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
    """Kept for backward at the schedule's peak, logits included."""
    in_flight: int
    """Micro-batches of one chunk whose activations are held at that peak."""
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
            for axis in ("tensor", "context", "expert", "data", "pipeline")
            if any(s.sent_bytes.get(axis) for s in self.stages)
        ]
        title = (
            f"each rank of {self.world_size:,}, by pipeline stage (GiB; built and stepped on the meta device in "
            f"{self.seconds:.0f} s)"
        )
        placement = self.schedule.placement
        caption = (
            f"schedule {self.schedule.kind}: {placement.ranks} ranks x {placement.chunks} chunks, {self.schedule.micro_batches} "
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
    schedule = choose_schedule(config, config.parallel.data)
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
    """Build and step the ranks at one place of the pipeline; gives their figures."""
    chunks = build_chunks(config, mesh, device="meta")
    unique = {id(p): p for chunk in chunks for p in chunk.parameters()}
    parameters = sum(p.numel() for p in unique.values())
    weights = sum(p.numel() * p.element_size() for p in unique.values())
    narrow = config.precision.dtype != "fp32"
    replicas = mesh.data_context.size, mesh.expert_data.size
    experts = sum(p.numel() for p in unique.values() if slice_of(p).reduce_over == "expert_data")
    held = parameters - experts, experts
    shards = replicas if config.parallel.zero_stage or config.parallel.data_mode == "fully_shard" else (1, 1)
    own = sum(count // share for count, share in zip(held, shards, strict=True))
    states = count_states(config) + narrow  # fp32 masters are the weights themselves in fp32
    sent: dict[str, float] = {}
    kept = []
    for chunk in chunks:
        chunk_kept, chunk_sent = _step_on_paper(config, mesh, chunk)
        kept.append(chunk_kept)
        for axis, count in chunk_sent.items():
            sent[axis] = sent.get(axis, 0.0) + count * schedule.micro_batches
    gradients = parameters * FP32
    element = 2 if narrow else FP32
    for count, size, split in zip(held, replicas, shards, strict=True):
        if size > 1:
            # an all-reduce, or a reduce-scatter of the gradients and an all-gather of the weights
            gathered = count * (element if split > 1 else FP32)
            sent["data"] = sent.get("data", 0.0) + (count * FP32 + gathered) * (size - 1) / size
    boundary = find_local_seq_length(config, mesh) * config.train.micro_batch_size * config.model.hidden_size
    placement = schedule.placement
    messages = 0
    for stage in placement.of_rank(mesh.pipeline.rank):
        for other in (stage - 1, stage + 1):
            if 0 <= other < placement.stages and placement.rank(other) != mesh.pipeline.rank:
                messages += schedule.micro_batches
    if messages:
        sent["pipeline"] = float(messages * boundary * element)
    return StageFigures(
        stage=mesh.pipeline.rank,
        layers=sum(len(chunk.layers) for chunk in chunks),
        parameters=parameters,
        weight_bytes=weights,
        gradient_bytes=own * FP32 if config.parallel.zero_stage == 2 else gradients,
        optimizer_bytes=round(own * FP32 * states),
        # With several chunks the last one, whose logits are large, is at the turn: it is in flight once.
        activation_bytes=max(kept) * peak if len(kept) == 1 else max(kept[:-1]) * (peak - 1) + kept[-1],
        in_flight=peak,
        sent_bytes=sent,
    )


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention that keeps what torch's fused kernels keep; on the meta device torch would take its plain products.

    In every thread, since recomputation runs in autograd's own.
    """
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _KeepsInputs.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _KeepsInputs(torch.autograd.Function):
    """Keeps q, k, v, the output and the fp32 log-sum-exp of each row: Dao 2023 (arXiv:2307.08691), section 3.1.

    Shapes: q [B, A, S, d], k, v [B, K, S, d] -> [B, A, S, d]
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Storages(TorchDispatchMode):
    """Notes every storage that is written to or comes into being, to say later which are alive; not those of `known`."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Count the bytes of storages that something still holds."""
        gc.collect()
        return sum(size for reference, size in self._found.values() if not reference.expired())


def _step_on_paper(config: Config, mesh: Mesh, chunk: Transformer) -> tuple[int, dict[str, float]]:
    """Run one micro-batch forward and back: (bytes that are kept for backward, bytes sent by axis)."""
    rows, length = config.train.micro_batch_size, config.model.seq_length // mesh.context.size
    shape = (find_local_seq_length(config, mesh), rows, config.model.hidden_size)
    dtype = next(chunk.parameters()).dtype
    with use_backend("auto"), use_library(Paper()), _fused_attention(), count_bytes() as counted:
        with _Storages([*chunk.parameters(), *chunk.buffers()]) as storages:
            tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
            hidden = None if chunk.first else torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            batch = Batch(tokens, tokens).look_ahead(config.model.prediction.depth)
            output, _ = chunk(hidden, batch)
            objective = output.sum()
        del output, hidden
        kept = storages.alive()
        objective.backward()
    sent: dict[str, float] = {}
    for (_, axis), count in counted.bytes.items():
        sent[axis] = sent.get(axis, 0.0) + count
    return kept, sent
