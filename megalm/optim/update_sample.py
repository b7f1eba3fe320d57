"""How large the next update would be, measured before it is made, on a sample of every tensor's elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.optim.rules import Rule
from megalm.optim.stretches import Part, Stretch, TensorIndex

PLACES = 128
"""Elements of each tensor: the error of a root mean square over so many is 10 to 20%, and updates that do harm are several
times too large."""
_GOLDEN = 0.6180339887498949


class UpdateSample:
    """Mean square of the update at learning rate 1 (`Rule.sample`), over PLACES elements of each tensor.

    The places are fixed in the global tensor (golden-ratio steps, so that no column is favoured), hence the same on
    every layout. Gradients count with the factor that the last applied update had: this step's own clipping factor
    comes out of the same all-reduce.
    """

    def __init__(self, parts: Sequence[Part], index: TensorIndex) -> None:
        self.index = index
        device = index.mesh.device
        places_of: dict[tuple[Rule, float], list[tuple[Part, Tensor]]] = {}
        numbers: dict[tuple[Rule, float], list[Tensor]] = {}
        for part in parts:
            found = [(s, places) for s in part.stretches if len(places := _local_places(s))]
            if not found:
                continue
            where = torch.cat([places for _, places in found])
            kind = part.group.rule, part.group.rate
            places_of.setdefault(kind, []).append((part, where.to(device)))
            numbers.setdefault(kind, []).extend(
                torch.full((len(places),), index.number[s.piece.name]) for s, places in found
            )
        self._places = places_of
        self._numbers = {kind: torch.cat(tensors).to(device) for kind, tensors in numbers.items()}
        self.counts = torch.tensor([len(_places(size)) for size in index.sizes], dtype=torch.float64)

    @torch.no_grad()
    def sums(self, step: int, scale: float) -> Tensor:
        """This rank's sums of squares, for the update number `step` (from 1) with gradients multiplied by `scale`.

        Shapes: -> fp64 [tensors], to be summed over the world and divided by `counts`
        """
        total = torch.zeros(len(self.index), dtype=torch.float64, device=self.index.mesh.device)
        for (rule, rate), places in self._places.items():
            update = rule.sample([part for part, _ in places], [where for _, where in places], step, scale) * rate
            total.index_add_(0, self._numbers[rule, rate], update.double().square())
        return total


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
