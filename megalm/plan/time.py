"""Seconds of a training step: kernels, communication that nothing hides, the pipeline's bubble, the update."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from megalm.architecture.blocks import MixtureSpec
from megalm.architecture.tensors import is_matrix
from megalm.config import ModelConfig
from megalm.config.precision import BYTES
from megalm.pipeline.schedule import build_schedule
from megalm.pipeline.timeline import Costs, build_timeline
from megalm.plan.communication import MeshLinks, make_mesh_links
from megalm.plan.layout import Layout
from megalm.plan.machine import Machine
from megalm.plan.roofline import (
    LayerTime,
    Roofline,
    count_orthogonal_flops,
    estimate_ends_time,
    estimate_layer_time,
    estimate_optimizer_time,
)
from megalm.plan.stages import Held, Pieces, Stack, count_local_parameters, list_rank_stacks, sort_layers, take_one

OVERLAP = 0.9
"""Share of a communication that can hide behind computation: kernels start late and links share the memory."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by part; the parts add up to `total`."""

    matmul: float
    attention: float
    memory_bound: float
    recompute: float
    logits: float
    tensor_communication: float
    context_communication: float
    expert_communication: float
    pipeline_communication: float
    data_communication: float
    """What the backward pass does not hide."""
    bubble: float
    optimizer: float
    hidden_communication: float
    """Communication behind computation; not part of the total."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(getattr(self, part) for part in PARTS)

    def as_dict(self) -> dict[str, float]:
        """With units in the keys."""
        return {
            **{f"{part}_seconds": getattr(self, part) for part in PARTS},
            "hidden_communication_seconds": self.hidden_communication,
            "step_seconds": self.total,
        }


PARTS = (
    "matmul", "attention", "memory_bound", "recompute", "logits", "tensor_communication", "context_communication",
    "expert_communication", "pipeline_communication", "data_communication", "bubble", "optimizer",
)  # fmt: skip


def estimate_step_time(model: ModelConfig, layout: Layout, machine: Machine, *, exact: bool = True) -> StepTime:
    """Estimate seconds of one step of a model under a layout on a machine; exact: the pipeline is simulated, action by action."""
    return _Clock(model, sort_layers(model), layout, machine, exact).step()


def make_machine_key(machine: Machine) -> tuple[Any, ...]:
    """Make a hashable stand-in of what a machine's kernels depend on."""
    key = (id(machine.accelerator), machine.gpus if machine.is_cpu else 0)
    _MACHINES.setdefault(key, machine)
    return key


_MACHINES: dict[tuple[Any, ...], Machine] = {}


@lru_cache(maxsize=65536)
def _time_kinds(
    pieces: Pieces, layout: Layout, machine: tuple[Any, ...]
) -> tuple[tuple[LayerTime, ...], tuple[float, float], Roofline]:
    """A layer of each kind, and the ends; of a layout without what these do not depend on."""
    roofline = Roofline(_MACHINES[machine], layout.dtype, layout.narrow)
    times = tuple(estimate_layer_time(pieces.shape, kind, layout, roofline) for kind in pieces.kinds)
    forward, backward = estimate_ends_time(pieces.shape, layout, roofline)
    heads = 1 + sum(pieces.behind)  # each layer that predicts a further token has logits of its own
    return times, (heads * forward, heads * backward), roofline


def _of_a_layer(layout: Layout) -> Layout:
    """What the time of a layer's kernels depends on."""
    return Layout(
        tensor=layout.tensor, context=layout.context, expert=layout.expert, expert_tensor=layout.expert_tensor,
        sequence=layout.sequence, recompute=layout.recompute, micro_batch=layout.micro_batch, dtype=layout.dtype,
        imbalance=layout.imbalance, narrow=layout.narrow,
    )  # fmt: skip


def _average(times: Sequence[LayerTime], stack: Stack) -> LayerTime:
    """The mean layer of a stage."""
    count = sum(stack)
    if len(stack) == 1:
        return times[0]
    return LayerTime(
        *(
            sum(getattr(time, field.name) * n for time, n in zip(times, stack, strict=True)) / count
            for field in fields(LayerTime)
        )
    )


class _Clock:
    """One evaluation: the pieces that several parts share."""

    def __init__(
        self,
        model: ModelConfig,
        pieces: Pieces,
        layout: Layout,
        machine: Machine,
        exact: bool,
    ) -> None:
        self.exact = exact
        self.model, self.pieces, self.layout = model, pieces, layout
        key = make_machine_key(machine)
        times, (self.logits_forward, self.logits_backward), self.roofline = _time_kinds(
            pieces, _of_a_layer(layout), key
        )
        self.links: MeshLinks = make_mesh_links(layout, machine)
        self.size = BYTES[layout.dtype]
        self.tokens = model.seq_length * layout.micro_batch / layout.context

        def cost(stack: Stack) -> float:
            return sum(n * (time.forward + time.backward) for n, time in zip(stack, times, strict=True))

        self.stack = max(list_rank_stacks(model, layout), key=cost)
        """The slowest stage's layers."""
        self.layers = sum(self.stack)
        self.layer = _average(times, self.stack)
        mixed = [isinstance(kind.mlp, MixtureSpec) for kind in pieces.kinds]
        self.mixtures = sum(n for n, is_mixed in zip(self.stack, mixed, strict=True) if is_mixed)

    def step(self) -> StepTime:
        layout, layer, layers = self.layout, self.layer, self.layers
        batches = layout.micro_batches
        exact = layout.global_batch / (layout.data * layout.micro_batch)
        tensor = self._tensor_communication() * layers
        context = self._context_communication() * layers
        expert = self._expert_communication() * self.mixtures
        logits = self.logits_forward + self.logits_backward
        # A stage's micro-batch: the layers of the fullest stage; the logits' time is shared out by cutting stages by cost.
        share = layers / (self.model.num_layers + self.model.prediction.depth) if layout.pipeline > 1 else 1.0
        gathered, hidden_gather = self._gathered_weights(layers)
        per_batch = layers * (layer.forward + layer.backward) + tensor + context + expert + logits * share + gathered
        bubble, messages = self._pipeline(per_batch)
        reduction, hidden_reduction = self._gradient_reduction(per_batch)
        return StepTime(
            matmul=exact * layers * (layer.matmul_forward + layer.matmul_backward),
            attention=exact * layers * (layer.attention_forward + layer.attention_backward),
            memory_bound=exact * layers * (layer.memory_forward + layer.memory_backward) + self._accumulate() * batches,
            recompute=exact * layers * layer.recompute,
            logits=exact * logits * share,
            tensor_communication=exact * tensor,
            context_communication=exact * context,
            expert_communication=exact * expert,
            pipeline_communication=messages,
            data_communication=gathered * batches + reduction,
            bubble=bubble,
            optimizer=self._update(),
            hidden_communication=hidden_gather * batches + hidden_reduction,
        )

    def _held(self, stack: Stack, first: bool = False, last: bool = False) -> Held:
        return count_local_parameters(self.pieces, stack, first, last, self.layout.weight_axes)

    def _tensor_communication(self) -> float:
        """Per layer: two all-reduces forward and two backward (or their halves under sequence parallelism)."""
        links = self.links.tensor
        rounds = 4.0 + (2.0 if self.layout.recompute == "full" else 0.0)
        return rounds * links.all_reduce(self.tokens * self.model.hidden_size * self.size)

    def _context_communication(self) -> float:
        """Keys and values to all ranks of the axis, forward and (with their gradients) backward, behind attention."""
        total = (
            2
            * self.tokens
            * self.layout.context
            * self.pieces.kinds[0].attention.key_width
            / self.layout.tensor
            * self.size
        )
        moving = 3 * self.links.context.all_gather(total)
        compute = self.layer.attention_forward + self.layer.attention_backward
        return max(moving - OVERLAP * compute, moving * (1 - OVERLAP)) if self.layout.context > 1 else 0.0

    def _expert_communication(self) -> float:
        """Of a mixture: tokens to every part of their experts and back, forward and backward (and forward again)."""
        layout, links = self.layout, self.links.expert
        if links.size == 1:
            return 0.0
        visits = self.model.moe.top_k * layout.expert_tensor
        sent = self.tokens / layout.tensor * visits * self.model.hidden_size * self.size
        return (6 if layout.recompute == "full" else 4) * links.all_to_all(sent)

    def _pipeline(self, per_batch: float) -> tuple[float, float]:
        """(bubble, exposed messages) seconds of a step: from the simulated schedule, or its closed form when that is long."""
        layout = self.layout
        if layout.pipeline == 1:
            return 0.0, 0.0
        stream = self.tokens * self.model.hidden_size * self.size
        message = self.links.pipeline.send(stream / layout.tensor)
        forward = per_batch * self.layer.forward / (self.layer.forward + self.layer.backward)
        weights = per_batch * 0.5 * self.layer.matmul_backward / (self.layer.forward + self.layer.backward)
        work = per_batch * layout.micro_batches
        if self.exact and layout.pipeline * layout.micro_batches * layout.virtual <= SIMULATED:
            costs = (forward, per_batch - forward - weights, weights)
            without = simulate_makespan(
                layout.schedule, layout.pipeline, layout.micro_batches, layout.virtual, costs, 0.0
            )
            full = simulate_makespan(
                layout.schedule, layout.pipeline, layout.micro_batches, layout.virtual, costs, message
            )
            return max(0.0, without - work), full - without
        return compute_bubble_fraction(layout) * work, 2 * layout.virtual * message * layout.micro_batches

    def _gathered_weights(self, layers: int) -> tuple[float, float]:
        """(exposed, hidden) seconds of gathering and reducing fully sharded layers in one micro-batch."""
        if not self.layout.fully_shard:
            return 0.0, 0.0
        one = max(self._held(take_one(self.stack, kind)).total for kind in range(len(self.stack)))
        links = self.links.data
        forward = links.all_gather(one * self.size)
        backward = links.all_gather(one * self.size) + links.reduce_scatter(one * 4.0)
        first = links.all_gather(self._held((0,) * len(self.stack), True, True).total * self.size)
        exposed = (
            first
            + forward
            + layers
            * (
                max(forward - OVERLAP * self.layer.forward, (1 - OVERLAP) * forward)
                + max(backward - OVERLAP * self.layer.backward, (1 - OVERLAP) * backward)
            )
        )
        return exposed, max(0.0, layers * (forward + backward) + first - exposed)

    def _gradient_reduction(self, per_batch: float) -> tuple[float, float]:
        """(exposed, hidden) seconds of the gradients' sum over the replicas, and of the weights' gathering (ZeRO)."""
        layout, links = self.layout, (self.links.data, self.links.expert_data)
        if layout.fully_shard or all(link.size == 1 for link in links):
            return 0.0, 0.0
        held = self._held(self.stack, layout.pipeline == 1, True)
        reduce = sum(link.reduce_scatter(4.0 * part) for link, part in zip(links, held, strict=True))
        size = 4.0 if layout.zero_stage == 0 else self.size
        gather = sum(link.all_gather(size * part) for link, part in zip(links, held, strict=True))
        rounds = layout.micro_batches if layout.zero_stage >= 2 else 1
        window = per_batch * 2 / 3 * rounds
        moving = rounds * reduce + (gather if layout.zero_stage == 0 else 0.0)
        exposed = max(moving - OVERLAP * window, (1 - OVERLAP) * moving)
        if layout.zero_stage:
            exposed += gather
            moving += gather
        return exposed, moving - exposed

    def _accumulate(self) -> float:
        """Adding a micro-batch's gradients to the fp32 sums."""
        held = self._held(self.stack, True, False)
        return self.roofline.moving(held.total * (self.size + 8.0))

    def _update(self) -> float:
        layout = self.layout
        held = self._held(self.stack, layout.pipeline == 1, True)
        split = layout.zero_stage or layout.fully_shard
        own = held.dense / layout.shards + held.experts / layout.expert_shards if split else held.total
        return estimate_optimizer_time(own, self.roofline) + self._orthogonalise()

    def _orthogonalise(self) -> float:
        """Newton-Schulz steps of a stage's matrices, dealt over the ranks that have parts of them."""
        layout = self.layout
        if not layout.orthogonal_steps:
            return 0.0
        split = layout.zero_stage or layout.fully_shard
        dense = layout.tensor * (layout.shards if split else 1)
        experts = layout.expert * layout.expert_tensor * (layout.expert_shards if split else 1)
        half, flops = self.roofline.processors == 1, 0.0
        for layer, times in zip(self.pieces.kinds, self.stack, strict=True):
            for name, shape in layer.list_tensors("layers.0."):
                if is_matrix(name, shape):
                    ranks = experts if ".experts." in name else dense
                    flops += times * count_orthogonal_flops(shape, half=half) / ranks
        return layout.orthogonal_steps * flops / self.roofline.rate


SIMULATED = 20_000
"""Longest pipeline (ranks x micro-batches x chunks) that is simulated rather than taken from a closed form."""


@lru_cache(maxsize=256)
def simulate_makespan(
    kind: str, ranks: int, batches: int, chunks: int, costs: tuple[float, float, float], message: float
) -> float:
    """Seconds from the first action of a pipeline to the last, simulated; costs of a whole rank's micro-batch."""
    forward, inputs, weights = (cost / chunks for cost in costs)
    schedule = build_schedule(kind, ranks, batches, chunks)
    return build_timeline(
        schedule.computation, schedule.placement, batches, Costs(forward, inputs, weights, message)
    ).makespan


def compute_bubble_fraction(layout: Layout) -> float:
    """Idle time of a stage over its working time, by schedule, in closed form.

    Sources: Narayanan et al. 2021 (GPipe and 1F1B (p-1)/m, interleaved (p-1)/(v m)); Qi et al. 2023 (ZB-H1: a third of
    1F1B's; ZB-V and DualPipe-V: the start-up of the forward passes alone).
    """
    stages, count = layout.pipeline, layout.micro_batches
    if stages == 1:
        return 0.0
    if layout.schedule in ("gpipe", "1f1b"):
        return (stages - 1) / count
    if layout.schedule == "interleaved":
        return (stages - 1) / (layout.virtual * count)
    if layout.schedule == "zb-h1":
        return (stages - 1) / (3 * count)
    return (stages - 1) / (6 * count)
