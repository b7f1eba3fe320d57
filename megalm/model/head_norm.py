"""Normalisation of queries and keys before their product, which bounds attention's logits."""

from typing import Any

import torch
from torch import Tensor, nn

from megalm.parallel import collectives
from megalm.parallel.linear import Output, split_rows
from megalm.parallel.mesh import Axis
from megalm.parallel.norm import Norm
from megalm.parallel.slices import Piece, Role, Slice, attach


class HeadNorm(nn.Module):
    """Norm of each head by itself: one weight of head_dim, shared by all heads.

    Shapes:  [S, B, A/t, d] -> the same
    Comm:    none; the weight's gradient is summed over the tensor axis, where each rank has other heads
    Source:  Dehghani et al. 2023 (arXiv:2302.05442); Qwen3's layout
    """

    def __init__(
        self,
        kind: str,
        head_dim: int,
        axis: Axis,
        *,
        name: str,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = Norm(kind, head_dim, name=name, eps=eps, axis=axis, sequence_parallel=True, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.contiguous())


class AllHeadsNorm(nn.Module):
    """RMSNorm over all heads of a token together, over the tensor axis: one weight of num_heads x head_dim.

    `heads` says how they lie on the ranks (its name: the norm's own).
    Shapes:  [S, B, A/t, d] -> the same;  weight [A d / t]
    Comm:    all-reduce of [S, B] sums of squares, in forward and in backward
    Source:  OLMo 2 (arXiv:2501.00656)
    """

    def __init__(
        self,
        heads: Output,
        axis: Axis,
        *,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name, features = heads.name, heads.features
        start, rows, _, self.replicas = split_rows(heads, axis)
        self.axis, self.features, self.eps = axis, features, eps
        over = (axis.block(self.replicas),) if self.replicas > 1 else ()
        owner = axis.rank % self.replicas == 0
        piece = Piece(f"{name}.weight", (features,), (start,), (rows,), 0, self.replicas, owner, over)
        self.weight = nn.Parameter(torch.ones(rows, device=device, dtype=dtype))
        attach(self.weight, Slice((piece,), role=Role.NORM, initial="ones"))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.flatten(2).float()
        squares = wide.square().sum(-1, keepdim=True) / self.replicas
        squares = collectives.copy(collectives.reduce(squares, self.axis), self.axis)
        scaled = wide * torch.rsqrt(squares / self.features + self.eps)
        return (self.weight * scaled.to(x.dtype)).view_as(x)
