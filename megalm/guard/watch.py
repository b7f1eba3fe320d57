"""What the guard watches beside the loss: attention logits that grow, and replicas whose weights differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megalm.config.guard import GuardConfig
from megalm.guard.advice import list_advice
from megalm.guard.replay import find_odd_replicas
from megalm.parallel.collectives import all_gather
from megalm.parallel.mesh import Axis
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class AttentionWatch:
    """Warns, once at each doubling, of attention logits that grow as they do long before a run diverges."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.warned_at = 0.0
        """Largest attention logit that was warned of."""

    def look(self, trainer: Trainer, step: int, signals: Signals) -> None:
        """Write the event `warning` where a logit is beyond guard.attention_warning, and twice what was told before."""
        limit, logit = self.config.attention_warning, signals.attention_logit
        if not limit or logit is None or not max(limit, 2 * self.warned_at) <= logit < math.inf:
            return
        self.warned_at = logit
        hints = [hint for hint in list_advice(trainer.config) if "attention" in hint]
        text = f"attention logits reach {logit:.0f}, as they do long before a run diverges"
        if hints:
            text += f"; what keeps them down in a new run: {' or '.join(hint.partition(':')[0] for hint in hints)}"
        trainer.events.write(
            "warning", step=step, what="attention_logit", attention_logit=logit, text=text, advice=hints
        )


class ReplicaWatch:
    """Compares, every guard.replica_check_every steps, the weights that ranks must have in common."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.equal_at = 0
        """Last step at which all replicas were seen to be equal."""

    def look(self, trainer: Trainer) -> bool:
        """Compare where it is due; True where they differ, which is an event then. Comm: one gathering over the world."""
        every, mesh = self.config.replica_check_every, trainer.mesh
        if not every or max(mesh.data_context.size, mesh.expert_data.size) == 1 or trainer.step % every:
            return False
        trainer.optimizer.wait_weights()
        flags = torch.zeros(mesh.world_size, dtype=torch.int64, device=mesh.device)
        flags[find_odd_replicas(trainer.model_chunks, mesh)] = 1
        odd = _gather_flags(flags, mesh.world)
        if not odd:
            self.equal_at = trainer.step
            return False
        trainer.events.write(
            "verdict",
            step=trainer.step,
            onset=self.equal_at + 1,
            cause="hardware",
            ranks=odd,
            text=f"weights that must be equal on all replicas differ: {name_ranks(odd)}",
        )
        return True


def name_ranks(ranks: list[int]) -> str:
    """Say who computed wrongly, as far as that can be told."""
    if not ranks:
        return "which rank had computed wrongly cannot be told, all weights agree again"
    return f"one of the ranks {', '.join(map(str, ranks))} had computed wrongly"


def _gather_flags(flags: Tensor, axis: Axis) -> list[int]:
    """The places that any rank has flagged."""
    if axis.size > 1:
        flags = all_gather(flags.unsqueeze(0), axis).amax(0)
    return torch.nonzero(flags).flatten().tolist()
