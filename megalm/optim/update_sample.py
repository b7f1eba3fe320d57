"""How large the next update would be, measured before it is made, on a sample of every tensor's elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.config.optim import OptimConfig
from megalm.optim.stretches import Part, Stretch, TensorIndex

PLACES = 128
"""Elements of each tensor: the error of a root mean square over so many is 10 to 20%, and updates that do harm are several
times too large."""
_GOLDEN = 0.6180339887498949


class UpdateSample:
    """Mean square of m' / (sqrt(v') + eps), Adam's update at learning rate 1, over PLACES elements of each tensor.

    The places are fixed in the global tensor (golden-ratio steps, so that no column is favoured), hence the same on
    every layout. Gradients count with the factor that the last applied update had: this step's own clipping factor
    comes out of the same all-reduce.
    """

    def __init__(self, parts: Sequence[Part], index: TensorIndex, optim: OptimConfig) -> None:
        self.parts, self.optim, self.index = parts, optim, index
        device = index.mesh.device
        self._where: list[Tensor] = []
        numbers: list[Tensor] = []
        for part in parts:
            found = [(s, places) for s in part.stretches if len(places := _local_places(s))]
            where = torch.cat([places for _, places in found]) if found else torch.empty(0, dtype=torch.int64)
            self._where.append(where.to(device))
            numbers += [torch.full((len(places),), index.number[s.piece.name]) for s, places in found]
        self._numbers = torch.cat(numbers).to(device) if numbers else torch.empty(0, dtype=torch.int64, device=device)
        self.counts = torch.tensor([len(_places(size)) for size in index.sizes], dtype=torch.float64)

    @torch.no_grad()
    def sums(self, step: int, scale: float) -> Tensor:
        """This rank's sums of squares, for the update number `step` (from 1) with gradients multiplied by `scale`.

        Shapes: -> fp64 [tensors], to be summed over the world and divided by `counts`
        """
        beta1, beta2 = self.optim.betas
        found = [(part, where) for part, where in zip(self.parts, self._where, strict=True) if len(where)]
        total = torch.zeros(len(self.index), dtype=torch.float64, device=self.index.mesh.device)
        if not found:
            return total
        gradient = torch.cat([part.gradient()[where] for part, where in found]) * scale
        first = torch.cat([part.exp_avg[where] for part, where in found]).lerp_(gradient, 1.0 - beta1)
        second = torch.cat([part.exp_avg_sq[where] for part, where in found]).lerp_(gradient.square(), 1.0 - beta2)
        second.div_(1.0 - beta2**step).sqrt_().add_(self.optim.eps)
        update = first.div_(second).div_(1.0 - beta1**step)
        return total.index_add_(0, self._numbers, update.double().square())


def _places(size: int) -> Tensor:
    """Row-major places of the sample in a tensor of so many elements."""
    if size <= PLACES:
        return torch.arange(size)
    fractions = (torch.arange(PLACES, dtype=torch.float64) * _GOLDEN) % 1.0
    return (fractions * size).long().unique()


def _local_places(stretch: Stretch) -> Tensor:
    """Where the sample of the whole tensor lies in the flat buffer, as far as this rank counts it."""
    piece = stretch.piece
    size = 1
    for extent in piece.global_shape:
        size *= extent
    rest = _places(size)
    local, factor = torch.zeros_like(rest), 1
    inside = torch.ones_like(rest, dtype=torch.bool)
    for whole, offset, extent in reversed(list(zip(piece.global_shape, piece.offset, piece.shape, strict=True))):
        at = rest % whole - offset
        rest = rest // whole
        inside &= (at >= 0) & (at < extent)
        local += at * factor
        factor *= extent
    flat = local[inside] - stretch.skip + stretch.start
    return flat[(flat >= stretch.first) & (flat < stretch.last)]
