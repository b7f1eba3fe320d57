"""Global gradient norm and the factor that bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megalm.ops import l2_norm_nonfinite
from megalm.parallel import collectives
from megalm.parallel.mesh import Mesh


class Passenger(Protocol):
    """Who has numbers of its own to sum over the world in the same message."""

    def message(self) -> Tensor | None: ...

    def take(self, summed: Tensor) -> None: ...


def sum_global_statistics(
    own: Sequence[Tensor], mesh: Mesh, extra: Tensor | None, passenger: Passenger | None = None
) -> tuple[Tensor, ...]:
    """(norm, non-finite elements[, extra]) over the world, fp64, from gradients that this rank alone contributes.

    Comm: one all-reduce over the world of 2 + len(extra) numbers, and the passenger's.
    """
    values = l2_norm_nonfinite(own, mesh.device)
    length = 0
    if extra is not None:
        length = len(extra)
        values = torch.cat([values, extra.to(device=mesh.device, dtype=torch.float64)])
    message = passenger.message() if passenger is not None else None
    if message is not None:
        values = torch.cat([values, message])
    collectives.all_reduce(values, mesh.world)
    if passenger is not None and message is not None:
        passenger.take(values[2 + length :])
    if extra is None:
        return values[0].sqrt(), values[1]
    return values[0].sqrt(), values[1], values[2 : 2 + length]


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of global norm `norm` are multiplied by so that it stays within `max_norm`; 1 when max_norm is 0
    (never clip)."""
    if max_norm == 0:
        return torch.ones_like(norm)
    # The small constant keeps a zero norm finite, as in torch.nn.utils.clip_grad_norm_.
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
