"""Muon: each matrix moves by the orthogonal matrix nearest to its momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.config.optim import STATES, OptimConfig
from megalm.optim.rules.whole import WholeMatrixRule

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
"""K. Jordan 2024 (kellerjordan.github.io/posts/muon); torch.optim.Muon's. Singular values end between 0.7 and 1.15."""
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Megatron core's default: closer to 1, from 0.98 to 1.03 where they were of one size."""
POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
"""Amsel et al. 2025 (arXiv:2505.16932), for a matrix divided by 1.02 times its norm."""
COEFFICIENTS = {"jordan": JORDAN, "quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
MARGIN = {"polar_express": 1.02}
"""What the norm that a matrix is divided by is multiplied with."""
EPS = 1e-7

SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
    "jordan": lambda rows, columns: sqrt(max(1.0, rows / columns)),
    "width": lambda rows, columns: sqrt(rows / columns),
}
"""Factor of the update by the matrix's shape. match_rms: a root mean square of about 0.2, as AdamW's, whose learning rate and
decay then carry over (Moonlight, arXiv:2502.16982); jordan: as in the original; width: learning rates carry over to other
widths."""


def orthogonalize(matrix: Tensor, coefficients: Sequence[tuple[float, float, float]], margin: float = 1.0) -> Tensor:
    """About U V^T of matrix = U S V^T, by as many Newton-Schulz steps as there are coefficients, in the matrix's dtype.

    X <- a X + (b A + c A A) X with A = X X^T, from X = matrix / (margin |matrix| + eps) on, along the shorter side.
    Shapes: [m, n] -> the same; zeros give zeros
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / (margin * x.norm() + EPS)
    for a, b, c in coefficients:
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


class Muon(WholeMatrixRule):
    """M = mu M + g;  direction = c orthogonalize(g + mu M), or of M (without Nesterov), with c by the shape (SCALES).

    For matrices alone: embedding, output matrix, norms, biases and routers take AdamW (`megalm.optim.groups`). Matrices that
    are stored together (query, key and value; gate and up; the experts) are orthogonalised each by itself.

    Source: K. Jordan 2024; Liu et al. 2025 (Moonlight, arXiv:2502.16982)
    """

    states = STATES["muon"]

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__(optim)
        muon = optim.muon
        steps = COEFFICIENTS[muon.coefficients]
        if muon.steps > len(steps) and len(set(steps)) > 1:
            raise ConfigError(
                f"optim.muon.steps={muon.steps}: the coefficients {muon.coefficients} are {len(steps)} different steps. Take "
                f"at most {len(steps)}, or optim.muon.coefficients=jordan."
            )
        self.coefficients = [steps[min(step, len(steps) - 1)] for step in range(muon.steps)]
        self.margin, self.scale = MARGIN.get(muon.coefficients, 1.0), SCALES[muon.scale]

    def prepare(self, gradient: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        mu = self.optim.muon.momentum
        momentum = state["muon_momentum"].mul_(mu).add_(gradient)
        return gradient + mu * momentum if self.optim.muon.nesterov else momentum

    def transform(self, matrix: Tensor) -> Tensor:
        narrow = matrix.bfloat16() if matrix.is_cuda else matrix
        return orthogonalize(narrow, self.coefficients, self.margin).to(matrix.dtype) * self.scale(*matrix.shape)

    def cost(self, shape: Sequence[int]) -> float:
        short, long = sorted(shape)
        return 4.0 * short**2 * long + 2.0 * short**3

    def expected_size(self, shape: Sequence[int]) -> float:
        """An orthogonal matrix [m, n] has min(m, n) singular values of 1."""
        return self.scale(*shape) / sqrt(max(shape))
