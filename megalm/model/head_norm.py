"""Normalisation of queries and keys before their product, which bounds attention's logits."""

from typing import Any

import torch
from torch import Tensor, nn

from megalm.architecture.blocks import NormSpec
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
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"unit_offset": unit_offset, "device": device, "dtype": dtype}
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
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.features, self.eps = axis, heads.features, eps
        self.unit_offset = unit_offset
        self.weight, self.replicas = _head_weights(heads, axis, unit_offset, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.flatten(2).float()
        squares = wide.square().sum(-1, keepdim=True) / self.replicas
        squares = collectives.copy(collectives.reduce(squares, self.axis), self.axis)
        scaled = wide * torch.rsqrt(squares / self.features + self.eps)
        weight = 1 + self.weight if self.unit_offset else self.weight
        return (weight * scaled.to(x.dtype)).view_as(x)


class EachHeadNorm(nn.Module):
    """Norm of each head by itself, with a weight of its own: head_dim weights for each head, where the head is.

    Shapes:  [S, B, A/t, d] -> the same;  weight [A d / t]
    Comm:    none
    Source:  Cohere's Command R+ (use_qk_norm)
    """

    def __init__(
        self,
        norm: NormSpec,
        heads: Output,
        head_dim: int,
        axis: Axis,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.head_dim = norm.kind, norm.eps, head_dim
        self.unit_offset = norm.unit_offset
        self.weight, _ = _head_weights(heads, axis, norm.unit_offset, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdim=True)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float().view(-1, self.head_dim)
        return ((1 + weight if self.unit_offset else weight) * scaled).to(x.dtype)


def _head_weights(heads: Output, axis: Axis, unit_offset: bool, **made: Any) -> tuple[nn.Parameter, int]:
    """A weight for each feature of this rank's heads, and how many ranks have the same heads."""
    start, rows, _, replicas = split_rows(heads, axis)
    over = (axis.block(replicas),) if replicas > 1 else ()
    owner = axis.rank % replicas == 0
    piece = Piece(f"{heads.name}.weight", (heads.features,), (start,), (rows,), 0, replicas, owner, over)
    weight = nn.Parameter(torch.full((rows,), float(not unit_offset), **made))
    return attach(weight, Slice((piece,), role=Role.NORM, initial=0.0 if unit_offset else "ones")), replicas
