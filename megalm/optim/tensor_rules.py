"""Rules that treat each tensor by itself, whatever the layout: clipping of its gradient, and of its update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megalm.config.optim import OptimConfig
from megalm.ops import Segments, update_clipping_rates
from megalm.optim.adaptive_clip import AdaGC, make_clip
from megalm.optim.stretches import Part, TensorIndex, sum_squares
from megalm.parallel import collectives
from megalm.parallel.mesh import Mesh


class TensorRules:
    """AdaGC and StableAdamW's update clipping, or only the clipping of the whole gradient where neither is asked for.

    Update clipping: a tensor is updated with lr / max(1, RMS), RMS^2 = mean(g^2 / max(v, eps^2)), where v is the new,
    bias-corrected second moment: gradients that their own history does not explain make small steps, not large ones.
    Source: Wortsman et al. 2023 (StableAdamW, arXiv:2304.13013), algorithm 2
    """

    def __init__(self, optim: OptimConfig, parts: Sequence[Part], mesh: Mesh) -> None:
        self.optim, self.parts, self.mesh = optim, list(parts), mesh
        self.active = optim.update_clip or optim.adaptive_clip.kind == "adagc"
        self.index = TensorIndex(parts, mesh) if self.active else None
        self._layouts = [_Layout(part, self.index) for part in parts] if self.index else []
        self.clip = make_clip(optim, self.index.names if self.index else ())
        self._norms: np.ndarray | None = None

    def message(self) -> Tensor | None:
        """What is to be summed over the world with the gradient norm. Shapes: -> fp64 [tensors]"""
        return sum_squares(self.parts, self.index) if self.index and isinstance(self.clip, AdaGC) else None

    def take(self, summed: Tensor) -> None:
        """Take the sums of `message`."""
        self._norms = summed.sqrt().cpu().numpy()

    def rates(self, grad_scale: float, step: int) -> list[Segments | None]:
        """For update number `step`, with gradients multiplied by `grad_scale`: clip single tensors' gradients, in place, and
        give the factors of the learning rate in each part.

        Comm: with update_clip, one all-reduce over the world of a number a tensor.
        """
        if self.index is None:
            return [None] * len(self.parts)
        if isinstance(self.clip, AdaGC):
            assert self._norms is not None, "statistics() comes before step()"
            factors = self.clip.tensor_factors(self._norms * grad_scale)
            for part in self.parts:
                gradient = part.gradient()
                for s in part.stretches:
                    if (factor := factors[self.index.number[s.piece.name]]) < 1.0:
                        gradient[s.start : s.stop].mul_(float(factor))
        if not self.optim.update_clip:
            return [None] * len(self.parts)
        sums = torch.zeros(len(self.index), dtype=torch.float64, device=self.mesh.device)
        for part, layout in zip(self.parts, self._layouts, strict=True):
            layout.add(part, sums, step, grad_scale)
        collectives.all_reduce(sums, self.mesh.world)
        sizes = torch.tensor(self.index.sizes, dtype=torch.float64, device=self.mesh.device)
        rates = update_clipping_rates(sums, sizes)
        return [layout.segments(rates) for layout in self._layouts]


class _Layout:
    """Where the tensors of a part begin and end, as the kernels want it: every element belongs to a run of one tensor."""

    def __init__(self, part: Part, index: TensorIndex) -> None:
        device = part.master.device
        ends: list[int] = []
        numbers: list[int] = []  # of the tensor; what no tensor covers is zero, whatever its rate
        for s in part.stretches:
            ends.append(s.stop)
            numbers.append(index.number[s.piece.name])
        if ends and ends[-1] < part.master.numel():
            ends.append(part.master.numel())
            numbers.append(numbers[-1])
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.numbers = torch.tensor(numbers, dtype=torch.int64, device=device)
        counted = [(index.number[s.piece.name], s.first, s.last) for s in part.stretches if s.last > s.first]
        self.low = counted[0][1] if counted else 0
        self.lengths: list[int] = []
        tensors: list[int] = []
        at = self.low
        for number, first, last in counted:
            self.lengths += [first - at, last - first]
            tensors += [number, number]
            at = last
        self.high = at
        self.counted = torch.tensor(tensors[1::2], dtype=torch.int64, device=device)

    def add(self, part: Part, sums: Tensor, step: int, scale: float) -> None:
        """Add what this rank counts of each tensor's squared update. Shapes: sums fp64 [tensors]"""
        if not self.lengths:
            return
        state = {name: flat[self.low : self.high] for name, flat in part.state.items()}
        gradient = part.gradient()[self.low : self.high]
        found = part.group.rule.update_squares(gradient, state, self.lengths, step, scale)
        sums.index_add_(0, self.counted, found[1::2])

    def segments(self, rates: Tensor) -> Segments | None:
        """Shapes: rates fp32 [tensors]"""
        return Segments(self.ends, rates[self.numbers]) if len(self.ends) else None
