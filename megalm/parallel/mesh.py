"""The grid of ranks: which ranks share a tensor, a context, a data, a pipeline or an expert group with this one.

    rank = ((pipeline * data + data_rank) * context + context_rank) * tensor + tensor_rank

Tensor is fastest, so its ranks sit on one node; pipeline is slowest. The layers of a mixture deal the same ranks of a stage
out otherwise, over the product of data, context and tensor (parallel folding, arXiv:2504.14960):

    rank within the stage = (expert_data_rank * expert + expert_rank) * expert_tensor + expert_tensor_rank

A group of the process library is made once per set of ranks; an axis of size 1 has none and never communicates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from megalm.config.errors import ConfigError


class ParallelSizes(Protocol):
    """What `build_mesh` reads of a ParallelConfig (data already resolved to a number)."""

    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Axis:
    """One line of the grid through this rank.

    `rank` is this rank's place among `ranks` (world ranks). `group` is None when size is 1.
    `blocks[n]` is the sub-axis of n neighbours that this rank belongs to (only on the tensor axis, for replicated
    key/value heads).
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    blocks: dict[int, Axis] = field(default_factory=dict, compare=False, repr=False)

    def block(self, size: int) -> Axis:
        """The `size` neighbouring ranks on this axis among which this rank is; size divides the axis' size."""
        if size == self.size:
            return self
        if size == 1:
            return Axis(self.name, ranks=(self.ranks[self.rank],))
        return self.blocks[size]


@dataclass(frozen=True)
class Mesh:
    """All axes through this rank.

    data_context: ranks that hold the same parameters and see other tokens; gradients are summed over it.
    expert: ranks with other experts. expert_tensor: ranks with other parts of the same ones. expert_block: both together,
    the ranks that have all experts between them. expert_data: ranks that hold the same parts of the same experts; their
    gradients are summed over it.
    pipeline_ends: first and last stage (tied embeddings), size 1 on other stages.
    """

    rank: int
    world_size: int
    device: torch.device
    data: Axis
    context: Axis
    tensor: Axis
    pipeline: Axis
    expert: Axis
    expert_tensor: Axis
    expert_block: Axis
    data_context: Axis
    expert_data: Axis
    pipeline_ends: Axis
    world: Axis

    @staticmethod
    def single(device: str | torch.device = "cpu") -> Mesh:
        """One process, no process group at all."""
        names = (
            "data",
            "context",
            "tensor",
            "pipeline",
            "expert",
            "expert_tensor",
            "expert_block",
            "data_context",
            "expert_data",
            "pipeline_ends",
            "world",
        )
        return Mesh(rank=0, world_size=1, device=torch.device(device), **{name: Axis(name) for name in names})


def build_mesh(parallel: ParallelSizes, device_type: str = "cpu", timeout: timedelta | None = None) -> Mesh:
    """Build the mesh of this process in the initialised default process group (or of one process without any).

    Every rank must call it, at the same point: making groups is collective.
    timeout: of an operation on one of the groups; None: the process library's, which is not the default group's.
    Errors: ConfigError when the world's size is not divisible by tensor x context x pipeline, or what
        is left for a stage by expert x expert_tensor.
    """
    device = choose_local_device(device_type)
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    expert, expert_tensor = parallel.expert, parallel.expert_tensor
    block = expert * expert_tensor
    if not dist.is_initialized():
        if tensor * context * pipeline * block != 1:
            raise ConfigError(
                f"parallel.tensor={tensor} context={context} pipeline={pipeline} expert={expert} "
                f"expert_tensor={expert_tensor} needs a process group, and none is initialised: start it with "
                "python -m megalm.launch (world_size=N) or torchrun."
            )
        return Mesh.single(device)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % (tensor * context * pipeline):
        raise ConfigError(
            f"{world_size} ranks cannot be split into tensor={tensor} x context={context} x pipeline={pipeline} "
            f"(= {tensor * context * pipeline}): choose sizes whose product divides {world_size}."
        )
    data = world_size // (tensor * context * pipeline)
    stage = data * context * tensor
    if stage % block:
        raise ConfigError(
            f"parallel.expert={expert} x expert_tensor={expert_tensor} must divide data x context x tensor, which is {stage} "
            "here."
        )
    maker = _GroupMaker(rank, world_size, timeout)

    def world_rank(p: int, d: int, c: int, t: int) -> int:
        return ((p * data + d) * context + c) * tensor + t

    every_p, every_d, every_c, every_t = range(pipeline), range(data), range(context), range(tensor)
    lines = [[world_rank(p, d, c, t) for t in every_t] for p in every_p for d in every_d for c in every_c]
    blocks = [list(range(first, first + block)) for first in range(0, world_size, block)]
    tensor_axis = maker.axis("tensor", lines)
    for size in range(2, tensor):
        if tensor % size == 0:
            parts = [line[i : i + size] for line in lines for i in range(0, tensor, size)]
            tensor_axis.blocks[size] = maker.axis("tensor", parts)
    return Mesh(
        rank=rank,
        world_size=world_size,
        device=device,
        tensor=tensor_axis,
        context=maker.axis(
            "context", [[world_rank(p, d, c, t) for c in every_c] for p in every_p for d in every_d for t in every_t]
        ),
        data=maker.axis(
            "data", [[world_rank(p, d, c, t) for d in every_d] for p in every_p for c in every_c for t in every_t]
        ),
        data_context=maker.axis(
            "data_context",
            [[world_rank(p, d, c, t) for d in every_d for c in every_c] for p in every_p for t in every_t],
        ),
        pipeline=maker.axis(
            "pipeline", [[world_rank(p, d, c, t) for p in every_p] for d in every_d for c in every_c for t in every_t]
        ),
        pipeline_ends=maker.axis(
            "pipeline_ends",
            [
                [world_rank(p, d, c, t) for p in sorted({0, pipeline - 1})]
                for d in every_d
                for c in every_c
                for t in every_t
            ],
        ),
        expert=maker.axis("expert", [row[x::expert_tensor] for row in blocks for x in range(expert_tensor)]),
        expert_tensor=maker.axis(
            "expert_tensor",
            [row[i : i + expert_tensor] for row in blocks for i in range(0, block, expert_tensor)],
        ),
        expert_block=maker.axis("expert", blocks),
        expert_data=maker.axis(
            "expert_data",
            [list(range(p * stage + i, (p + 1) * stage, block)) for p in every_p for i in range(block)],
        ),
        world=maker.axis("world", [list(range(world_size))]),
    )


def choose_local_device(device_type: str, local_rank: int | None = None) -> torch.device:
    """This process' device: the CPU, or the accelerator numbered by its local rank (default: LOCAL_RANK).

    Where a launcher lets each process see only its own accelerators, they are counted from 0 again.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
    return torch.device(device_type, number % max(1, torch.accelerator.device_count()))


class _GroupMaker:
    """Makes each distinct set of ranks into one process group; all ranks walk the same lists in the same order."""

    def __init__(self, rank: int, world_size: int, timeout: timedelta | None) -> None:
        self.rank, self.timeout = rank, timeout
        self.groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(world_size)): dist.group.WORLD}

    def axis(self, name: str, lines: Sequence[Sequence[int]]) -> Axis:
        """The axis of the line that this rank is in; a line of its own where it is in none."""
        mine = Axis(name, ranks=(self.rank,))
        for line in lines:
            ranks = tuple(line)
            if len(ranks) > 1 and ranks not in self.groups:
                made = dist.new_group(list(ranks), timeout=self.timeout)
                self.groups[ranks] = made if self.rank in ranks else None
            if self.rank in ranks and len(ranks) > 1:
                mine = Axis(name, len(ranks), ranks.index(self.rank), ranks, self.groups[ranks])
        return mine
