"""Which layers each pipeline stage has, and the parameters of one of its ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace
from math import ceil, prod
from typing import NamedTuple

from megalm.architecture.kept import cache_by_model
from megalm.architecture.layers import LayerSpec, specify_layers, specify_predictions
from megalm.architecture.shape import ModelShape, resolve_shape
from megalm.architecture.tensors import describe_embedding_tensor, list_back_tensors, list_front_tensors
from megalm.config import ModelConfig
from megalm.pipeline.actions import Placement
from megalm.pipeline.partition import LayerCosts, count_layer_costs, partition
from megalm.plan.layout import Layout

V_SCHEDULES = ("zb-v", "dualpipe-v")
"""Schedules whose first and last stage share a rank."""

Stack = tuple[int, ...]
"""How many layers of each of a model's kinds."""


class Held(NamedTuple):
    """Parameters on a rank: those of experts are shared out over other ranks than the rest."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts


def take_one(stack: Stack, kind: int) -> Stack:
    """Take a single layer of a kind, where the stage has one."""
    return tuple(int(number == kind and times > 0) for number, times in enumerate(stack))


@dataclass(frozen=True, eq=False)
class Pieces:
    """The model, as stages are counted from it. Equal models have the same one: see `cut_pieces`."""

    shape: ModelShape
    kinds: tuple[LayerSpec, ...]
    """The different layers, in the order in which they appear."""
    order: tuple[int, ...]
    """The kind of each layer."""
    behind: Stack
    """Layers that predict further tokens, by kind: the last stage has them, behind its own."""
    costs: LayerCosts

    def count_stack(self, layers: Sequence[int]) -> Stack:
        """Count the layers with these numbers by kind."""
        found = [0] * len(self.kinds)
        for layer in layers:
            found[self.order[layer]] += 1
        return tuple(found)

    def count_held(self, stack: Stack, first: bool, last: bool, axes: tuple[int, int, int]) -> Held:
        """Count parameters that one rank of a stage with these layers holds; axes: tensor, expert, expert_tensor."""
        kv_heads = self.kinds[0].attention.num_kv_heads
        pieces = [
            (name, full, times)
            for layer, times in zip(self.kinds, stack, strict=True)
            if times
            for name, full in layer.list_tensors()
        ]
        if first:
            pieces += [(name, full, 1) for name, full in list_front_tensors(self.shape)]
        if last:
            pieces += [(name, full, 1) for name, full in list_back_tensors(self.shape)]
        if last and not first and (self.shape.tie_embeddings or any(self.behind)):
            pieces.append((*describe_embedding_tensor(self.shape), 1))
        sums = [0.0, 0.0]
        for name, full, times in pieces:
            sums[".experts." in name] += prod(shard_shape(kv_heads, name, full, axes)) * times
        return Held(*sums)


@cache_by_model
def sort_layers(model: ModelConfig) -> Pieces:
    """Resolve a model and sort its layers by kind."""
    layers, behind = specify_layers(model), specify_predictions(model)
    kinds = tuple(dict.fromkeys((*layers, *behind)))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    order = tuple(numbers[layer] for layer in layers)
    return Pieces(resolve_shape(model), kinds, order, tuple(map(behind.count, kinds)), count_layer_costs(model))


@lru_cache(maxsize=4096)
def count_local_parameters(pieces: Pieces, stack: Stack, first: bool, last: bool, axes: tuple[int, int, int]) -> Held:
    """What `Pieces.count_held` counts, counted once."""
    return pieces.count_held(stack, first, last, axes)


def shard_shape(kv: int, name: str, shape: tuple[int, ...], axes: tuple[int, int, int]) -> tuple[float, ...]:
    """Shape of one rank's share of a tensor, with `kv` key/value heads; experts count by their share of their axes."""
    tensor, expert, parts = axes
    if ".experts." in name:
        if name.endswith("down.weight"):
            return (shape[0] / expert, shape[1] / parts)
        return (shape[0] / expert / (1 if ".down." in name else parts), *shape[1:])
    if tensor == 1:
        return shape
    if name in ("embedding.weight", "output.weight"):
        return (ceil(shape[0] / tensor), *shape[1:])
    # Heads that do not divide are dealt out: the fullest rank's share.
    heads = ceil(kv / tensor) / kv if kv >= tensor else 1 / tensor
    if ".key." in name or ".value." in name:
        return (shape[0] * max(heads, 1 / kv), *shape[1:])
    if ".query." in name or ".query_up." in name or ".key_value_up." in name:
        return (shape[0] * heads, *shape[1:])
    if name.endswith("attention.output.weight"):
        return (shape[0], shape[1] * heads)
    if ".gate." in name or ".up." in name:
        return (shape[0] / tensor, *shape[1:])
    if name.endswith("down.weight"):
        return (shape[0], shape[1] / tensor)
    return shape


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


@lru_cache(maxsize=1024)
def _cut_kinds(pieces: Pieces, stages: int) -> tuple[Stack, ...]:
    """The stages of a model whose layers differ: cut as the engine cuts them."""
    *others, last = (pieces.count_stack(layers) for layers in partition(pieces.costs, stages))
    return (*others, tuple(own + more for own, more in zip(last, pieces.behind, strict=True)))


def list_stage_stacks(model: ModelConfig, stages: int) -> tuple[Stack, ...]:
    """List layers of each pipeline stage, cut by cost: the logits count on the last one."""
    pieces = sort_layers(model)
    if len(pieces.kinds) > 1:
        return _cut_kinds(pieces, stages)
    costs = pieces.costs
    layer = costs.layers[0]
    return tuple((n,) for n in _cut(model.num_layers, stages, costs.embedding / layer, costs.output / layer))


def count_stage_layers(model: ModelConfig, stages: int) -> tuple[int, ...]:
    """Count how many layers each pipeline stage has."""
    return tuple(sum(stack) for stack in list_stage_stacks(model, stages))


def list_rank_stacks(model: ModelConfig, layout: Layout) -> list[Stack]:
    """List layers of each pipeline rank, over all its chunks."""
    cut = list_stage_stacks(model, layout.pipeline * layout.virtual)
    where = Placement(layout.pipeline, layout.virtual, "v" if layout.schedule in V_SCHEDULES else "loop")
    return [
        tuple(map(sum, zip(*(cut[stage] for stage in where.of_rank(rank)), strict=True)))
        for rank in range(layout.pipeline)
    ]
