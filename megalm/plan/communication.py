"""Seconds of collectives over an axis of the mesh: bandwidth and latency of the links that the axis crosses."""

from dataclasses import dataclass
from math import ceil, log2

from megalm.plan.layout import Layout
from megalm.plan.machine import Machine


@dataclass(frozen=True)
class Links:
    """Bandwidth (bytes/s of one rank, one direction) and latency (s of a step) of one axis."""

    size: int
    bandwidth: float
    latency: float

    def all_gather(self, total: float) -> float:
        """Seconds until every rank has all `total` bytes, of which each held its share; also a reduce-scatter's."""
        if self.size == 1 or total <= 0:
            return 0.0
        return (self.size - 1) / self.size * total / self.bandwidth + self.latency

    reduce_scatter = all_gather

    def all_reduce(self, total: float) -> float:
        """Seconds of a reduce-scatter and an all-gather of `total` bytes."""
        return 2 * self.all_gather(total)

    def all_to_all(self, total: float) -> float:
        """Seconds until each rank's `total` bytes are dealt evenly to all."""
        return self.all_gather(total)

    def send(self, total: float) -> float:
        """Seconds of one message to the next rank of the axis."""
        return 0.0 if self.size == 1 else total / self.bandwidth + self.latency


def choose_links(machine: Machine, size: int, stride: int, point_to_point: bool = False) -> Links:
    """Choose the links of an axis of `size` ranks that are `stride` ranks apart (tensor fastest).

    An axis inside a node has the fast link. One that leaves it has as many network ports as the node has ranks of the
    axis, and is no faster than the link (rings of NCCL through every port).
    """
    chip = machine.accelerator
    fast = chip.link_bandwidth * chip.link_efficiency
    if machine.is_cpu:
        return Links(size, fast / max(1, machine.gpus / 2), chip.link_latency * max(1.0, log2(max(size, 2))))
    node = chip.gpus_per_node
    if size * stride <= node:
        return Links(size, fast, chip.link_latency * max(1.0, log2(max(size, 2))))
    inside = max(1, min(size, node // stride)) if stride < node else 1
    slow = chip.network_bandwidth * chip.network_efficiency
    nodes = ceil(size / inside)
    latency = chip.link_latency * log2(max(inside, 2)) + chip.network_latency * max(1.0, log2(nodes))
    if point_to_point:
        return Links(size, slow, chip.network_latency)
    return Links(size, min(fast, slow * inside), latency)


@dataclass(frozen=True)
class MeshLinks:
    """The links of each axis of a layout."""

    tensor: Links
    context: Links
    expert: Links
    """The ranks that have all experts between them."""
    expert_data: Links
    """Ranks with the same experts: their gradients' reduction."""
    data: Links
    """Data and context together: the gradients' reduction."""
    pipeline: Links


def make_mesh_links(layout: Layout, machine: Machine) -> MeshLinks:
    """Links by axis, on the grid: tensor fastest, then context, data, pipeline slowest; experts over a stage's neighbours."""
    t, c = layout.tensor, layout.context
    block = layout.expert * layout.expert_tensor
    return MeshLinks(
        tensor=choose_links(machine, t, 1),
        context=choose_links(machine, c, t),
        expert=choose_links(machine, block, 1),
        expert_data=choose_links(machine, layout.expert_shards, block),
        data=choose_links(machine, layout.data * c, t),
        pipeline=choose_links(machine, layout.pipeline, t * c * layout.data, point_to_point=True),
    )
