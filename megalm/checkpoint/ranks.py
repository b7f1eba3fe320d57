"""How the ranks of a run talk about a checkpoint: small objects only, over a group of their own."""

import datetime
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from megalm.checkpoint.errors import CheckpointError
from megalm.config.errors import ConfigError


class Ranks(Protocol):
    """The ranks that save or load one checkpoint together. Every method is collective."""

    rank: int
    size: int

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, in rank order."""
        ...

    def gather(self, value: Any) -> list[Any] | None:
        """Gather every rank's `value` on rank 0; None elsewhere."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        ...


class SingleRank:
    """One process, no communication."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


class GroupRanks:
    """The ranks of the default process group, over a gloo group that nothing else uses.

    A group of its own lets the background thread of a save talk while the training step uses the other groups.
    Making one is collective: every rank constructs its `Checkpointer` at the same point of the program.

    Comm: objects of a few kilobytes a rank, pickled between processes of the same run; nothing of it touches a disk.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def all_gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def gather(self, value: Any) -> list[Any] | None:
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


def find_ranks(world_size: int, timeout_s: float) -> Ranks:
    """Find the ranks to save and load with: one process, or all ranks of the default process group."""
    return SingleRank() if world_size == 1 else GroupRanks(timeout_s)


def run_on_rank_0(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """The result of `action()` on rank 0, on every rank; so is a CheckpointError or ConfigError that it raises."""
    result: Any = None
    if ranks.rank == 0:
        try:
            result = action()
        except (CheckpointError, ConfigError) as error:
            result = error
    result = ranks.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return result


def agree_on(ranks: Ranks, problem: CheckpointError | None) -> None:
    """Raise the first rank's problem on all of them, if any has one."""
    for found in ranks.all_gather(problem):
        if found is not None:
            raise found


def catch_problem(action: Callable[[], object]) -> CheckpointError | None:
    """What `action()` fails with; None where it does not."""
    try:
        action()
    except CheckpointError as error:
        return error
    return None
