"""Named sums of a step: where each stands in the one message that all ranks add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megalm.parallel.mesh import Mesh


class Sums:
    """Names and sizes, alike on every rank, and their places in a vector.

    Any pipeline stage may have reported any of them; what a rank did not report counts as zero.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.places: dict[str, slice] = {}
        self.length = 0
        for name, size in sizes.items():
            self.places[name] = slice(self.length, self.length + size)
            self.length += size

    def pack(self, reports: Sequence[Mapping[str, Tensor]], mesh: Mesh) -> Tensor:
        """This rank's reports of all its micro-batches as one vector, such that the sum over the world counts each once.

        Shapes: each report's tensors of the declared sizes -> fp64 [length]
        """
        total = torch.zeros(self.length, dtype=torch.float64, device=mesh.device)
        for report in reports:
            for name, value in report.items():
                total[self.places[name]] += value
        return total / mesh.tensor.size  # each tensor rank reports the whole of its data rank's

    def unpack(self, values: Sequence[float] | np.ndarray) -> dict[str, np.ndarray]:
        """The added-up vector by name. Shapes: [length] -> fp64 [size] each"""
        whole = np.asarray(values, np.float64)
        return {name: whole[place] for name, place in self.places.items()}
