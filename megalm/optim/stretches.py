"""Which part of which global tensor lies where in the optimizer's flat buffers, and sums over whole tensors.

Per-tensor rules (adaptive clipping, update clipping) and per-tensor measurements need a number for each global tensor,
however its elements are spread over ranks. Each rank adds up its own stretches, counted once over all ranks; one
all-reduce of a number per tensor makes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.slices import Piece

if TYPE_CHECKING:
    from megalm.optim.groups import Group


@dataclass(frozen=True)
class Stretch:
    """Elements [start, stop) of a flat buffer: a part of one global tensor.

    skip: elements of the piece that lie before them. [first, last) are those that this rank counts: what several ranks
    hold is counted by the owner only, copies over the data ranks are dealt out.
    """

    piece: Piece
    start: int
    stop: int
    skip: int
    first: int
    last: int

    def view(self, flat: Tensor) -> Tensor:
        """The tensor within the flat buffer, in its own shape: where the stretch is the whole piece."""
        return flat[self.start : self.stop].view(self.piece.shape)


@dataclass(frozen=True)
class Part:
    """A flat share of the optimizer's state: one bucket's shard, or one fully sharded parameter.

    state: the group's rule's buffers, by name. pieces: of all global tensors that have a part in this share on any rank of
    `split`, in the same order on each; split: the axes over whose ranks the parts of one tensor are spread.
    Shapes: master, every state, gradient() all fp32 [N]; out, the rounded weights, [N] or None
    """

    stretches: tuple[Stretch, ...]
    master: Tensor
    state: Mapping[str, Tensor]
    gradient: Callable[[], Tensor]
    group: Group
    out: Tensor | None = None
    pieces: tuple[Piece, ...] = ()
    split: tuple[Axis, ...] = ()


class TensorIndex:
    """A number for each global tensor of the model, the same on every rank.

    Comm: one gathering of names over the world, when it is made.
    """

    def __init__(self, parts: Iterable[Part], mesh: Mesh) -> None:
        self.mesh = mesh
        own = {s.piece.name: s.piece.global_shape for part in parts for s in part.stretches}
        if mesh.world.size > 1:
            gathered: list[dict[str, tuple[int, ...]]] = [{}] * mesh.world.size
            dist.all_gather_object(gathered, own, group=mesh.world.group)
            own = {name: shape for part in gathered for name, shape in part.items()}
        self.names = sorted(own)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.sizes = [prod(own[name]) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def gather(self, stretches: Sequence[Stretch], values: Sequence[Tensor]) -> Tensor:
        """Add up one number a stretch by tensor. Shapes: values scalars -> fp64 [tensors], to be summed over the world"""
        sums = torch.zeros(len(self), dtype=torch.float64, device=self.mesh.device)
        if stretches:
            numbers = torch.tensor([self.number[s.piece.name] for s in stretches], device=self.mesh.device)
            sums.index_add_(0, numbers, torch.stack(list(values)).double())
        return sums


def sum_squares(parts: Iterable[Part], index: TensorIndex) -> Tensor:
    """This rank's share of each tensor's squared gradient norm. Shapes: -> fp64 [tensors]"""
    counted = [(part, s) for part in parts for s in part.stretches if s.last > s.first]
    norms = torch._foreach_norm([part.gradient()[s.first : s.last] for part, s in counted]) if counted else []
    return index.gather([s for _, s in counted], [norm.double().square() for norm in norms])
