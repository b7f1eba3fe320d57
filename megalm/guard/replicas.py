"""Replicas whose weights differ: who computed wrongly, and the majority's copy for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megalm.config.guard import GuardConfig
from megalm.guard.replay import find_odd_replicas, list_replicated
from megalm.parallel.collectives import all_gather, all_reduce, broadcast
from megalm.parallel.mesh import Axis, Mesh

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class ReplicaWatch:
    """Compares, every guard.replica_check_every steps, the weights that ranks must have in common."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.equal_at = 0
        """Last step at which all replicas were seen to be equal."""
        self.odd: list[int] = []
        """Ranks against the majority, as of the last comparison; all of them where there is none."""

    def look(self, trainer: Trainer) -> bool:
        """Compare where it is due; True where they differ, which is an event then. Comm: one gathering over the world."""
        every, mesh = self.config.replica_check_every, trainer.mesh
        if not every or max(mesh.data_context.size, mesh.expert_data.size) == 1 or trainer.step % every:
            return False
        trainer.optimizer.wait_weights()
        flags = torch.zeros(mesh.world_size, dtype=torch.int64, device=mesh.device)
        flags[find_odd_replicas(trainer.model_chunks, mesh)] = 1
        self.odd = _gather_flags(flags, mesh.world)
        if not self.odd:
            self.equal_at = trainer.step
            return False
        alone = self.odd[0] if len(self.odd) == 1 else None
        who = f"rank {alone} had computed wrongly" if alone is not None else name_ranks(self.odd)
        trainer.events.write(
            "sdc",
            step=trainer.step,
            onset=self.equal_at + 1,
            cause="hardware",
            rank=alone,
            ranks=self.odd,
            what="weights",
            text=f"weights that must be equal on all replicas differ: {who}",
        )
        return True

    def has_majority(self, mesh: Mesh) -> bool:
        """True where every odd rank has a replica that is not. Comm: one number over the world."""
        axes = (mesh.data_context, mesh.expert_data)
        good = all(axis.size == 1 or any(rank not in self.odd for rank in axis.ranks) for axis in axes)
        return bool(all_reduce(torch.tensor([int(good)], device=mesh.device), mesh.world, "min").item())

    def copy_majority(self, trainer: Trainer) -> None:
        """Give the odd ranks the others' weights and optimizer states. Comm: a broadcast of all that is replicated."""
        mesh = trainer.mesh
        trainer.optimizer.copy_from_replicas(self.odd)
        for name in ("data_context", "expert_data"):
            axis: Axis = getattr(mesh, name)
            if axis.size > 1:
                source = next(place for place, rank in enumerate(axis.ranks) if rank not in self.odd)
                for tensor in list_replicated(trainer.model_chunks, name):
                    if not isinstance(tensor, torch.nn.Parameter):
                        broadcast(tensor, axis, source)


def name_ranks(ranks: list[int]) -> str:
    """Say who computed wrongly, as far as that can be told."""
    if not ranks:
        return "which rank had computed wrongly cannot be told, all weights agree again"
    return f"one of the ranks {', '.join(map(str, ranks))} had computed wrongly"


def _gather_flags(flags: Tensor, axis: Axis) -> list[int]:
    """Gather the places that any rank has flagged."""
    if axis.size > 1:
        flags = all_gather(flags.unsqueeze(0), axis).amax(0)
    return torch.nonzero(flags).flatten().tolist()
