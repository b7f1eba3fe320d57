"""Muon: each matrix moves by the orthogonal matrix nearest to its momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.config.optim import STATES, OptimConfig
from megalm.optim.rules.whole import WholeMatrixRule
from megalm.parallel.slices import Piece

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
_TOGETHER = 1 << 26
"""Elements of matrices that go through the steps in one batch: 128 MiB of each of its tensors in bf16."""

SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
    "jordan": lambda rows, columns: sqrt(max(1.0, rows / columns)),
    "width": lambda rows, columns: sqrt(rows / columns),
}
"""Factor of the update by the matrix's shape. match_rms: a root mean square of about 0.2, as AdamW's, whose learning rate and
decay then carry over (Moonlight, arXiv:2502.16982); jordan: as in the original; width: learning rates carry over to other
widths."""


_BLOCKS = 8
"""Rows of a symmetric product are computed in so many blocks, each up to the diagonal: 9/16 of the products of all."""
_WORTH_BLOCKS = 128
"""Rows from which that is faster on a CPU."""


def multiply_symmetric(x: Tensor, added: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """alpha X X^T + beta added, with `added` symmetric. On a CPU half is computed and mirrored, in the bits of the whole.

    A GPU's kernel computes all of it: a launch for each block would cost more than it saves.
    Shapes: x [.., m, n], added [.., m, m] -> [.., m, m]
    """
    rows = x.shape[-2]
    if x.dim() > 2:
        turned = x.transpose(-1, -2)
        return torch.bmm(x, turned) if added is None else torch.baddbmm(added, x, turned, beta=beta, alpha=alpha)
    if x.is_cuda or rows < _WORTH_BLOCKS or rows % _BLOCKS:
        return x @ x.t() if added is None else torch.addmm(added, x, x.t(), beta=beta, alpha=alpha)
    out, height = x.new_empty(rows, rows), rows // _BLOCKS
    for top in range(0, rows, height):
        end = top + height
        block, left = out[top:end, :end], x[top:end]
        if added is None:
            torch.mm(left, x[:end].t(), out=block)
        else:
            torch.addmm(added[top:end, :end], left, x[:end].t(), beta=beta, alpha=alpha, out=block)
        out[:top, top:end] = out[top:end, :top].t()
    return out


def orthogonalize(matrix: Tensor, coefficients: Sequence[tuple[float, float, float]], margin: float = 1.0) -> Tensor:
    """About U V^T of matrix = U S V^T, by as many Newton-Schulz steps as there are coefficients, in the matrix's dtype.

    X <- a X + (b A + c A A) X with A = X X^T, from X = matrix / (margin |matrix| + eps) on, along the shorter side.
    Shapes: [m, n] or several of them [k, m, n] -> the same; zeros give zeros
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.transpose(-1, -2) if tall else matrix
    x = x / (margin * torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPS)
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in coefficients:
        gram = multiply_symmetric(x)
        x = add(x, multiply_symmetric(gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(-1, -2) if tall else x


class Muon(WholeMatrixRule):
    """M = mu M + g;  direction = c orthogonalize(g + mu M), or of M (without Nesterov), with c by the shape (SCALES).

    For matrices alone: embedding, output matrix, norms, biases and routers take AdamW (`megalm.optim.groups`). Matrices that
    are stored together (query, key and value; gate and up; the experts) are orthogonalised each by itself; with `split_heads`
    the rows of each head of queries, keys and values, too (of latent attention, of what expands the latents).

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
        return self._orthogonalize(matrix)

    def transform_all(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """On a GPU those of one shape go through the steps together; a CPU gains nothing by that."""
        if not matrices or not matrices[0].is_cuda:
            return super().transform_all(matrices)
        return self.transform_together(matrices)

    def transform_together(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Matrices of one shape by batched products, at most `_TOGETHER` elements at a time."""
        found: list[Tensor | None] = [None] * len(matrices)
        by_shape: dict[torch.Size, list[int]] = {}
        for place, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(place)
        for shape, places in by_shape.items():
            count = max(1, _TOGETHER // shape.numel())
            for start in range(0, len(places), count):
                chosen = places[start : start + count]
                moved = self._orthogonalize(torch.stack([matrices[place] for place in chosen]))
                for place, result in zip(chosen, moved, strict=True):
                    found[place] = result
        return [result for result in found if result is not None]

    def _orthogonalize(self, matrix: Tensor) -> Tensor:
        narrow = matrix.bfloat16() if matrix.is_cuda else matrix
        return orthogonalize(narrow, self.coefficients, self.margin).to(matrix.dtype) * self.scale(*matrix.shape[-2:])

    def count_blocks(self, piece: Piece) -> int:
        return piece.global_shape[0] // piece.unit if self.optim.muon.split_heads and piece.unit else 1

    def cost(self, shape: Sequence[int]) -> float:
        short, long = sorted(shape)
        return 4.0 * short**2 * long + 2.0 * short**3

    def expected_size(self, shape: Sequence[int]) -> float:
        """An orthogonal matrix [m, n] has min(m, n) singular values of 1."""
        return self.scale(*shape) / sqrt(max(shape))
