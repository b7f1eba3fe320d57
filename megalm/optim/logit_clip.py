"""QK-clip: heads whose attention logits grow too large get smaller query and key weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megalm.parallel import collectives
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Box, slice_of

if TYPE_CHECKING:
    from megalm.model.attention import Attention


class LogitClip:
    """Scales a head's logits by limit / largest, through its weights: where each query head has its own keys, both
    projections by the square root; where query heads share keys, the query's alone, so that no other head changes.

    The fp32 masters are scaled, before the update that gives the rounded weights anew; the largest logit is that of
    the forward pass with just these weights.

    Source: Kimi K2 2025 (MuonClip, arXiv:2507.20534), sec. 2.1
    """

    def __init__(self, layers: Sequence[Attention], boxes: Sequence[Box], mesh: Mesh) -> None:
        self.axis = mesh.data_context
        self._scaled: list[tuple[Box, Tensor, float]] = []  # box, place of each row's head in the factors, exponent
        by_name = {box.name: [b for b in boxes if b.name == box.name] for box in boxes if ".attention." in box.name}
        first = 0
        for layer in layers:
            query = slice_of(layer.qkv.weight).pieces[0]
            prefix = query.name.removesuffix("query.weight")
            width, heads = layer.spec.head_dim, query.shape[0] // layer.spec.head_dim
            shared = layer.spec.num_kv_heads != layer.spec.num_heads
            for kind in ("query",) if shared else ("query", "key"):
                for name in (f"{prefix}{kind}.weight", f"{prefix}{kind}.bias"):
                    for box in by_name.get(name, ()):
                        rows = torch.arange(box.tensor.shape[0], device=mesh.device) + box.offset[0]
                        head = (rows - query.offset[0]) // width + first
                        self._scaled.append((box, head, 1.0 if shared else 0.5))
            first += heads

    @torch.no_grad()
    def apply(self, largest: Tensor, limit: float) -> None:
        """Scale what exceeds the limit. Call it on every rank alike, between statistics() and step().

        Shapes: largest [heads of all layers on this rank], as seen on this rank's tokens
        Comm:   one all-reduce (max) of `largest` over data x context
        """
        largest = collectives.all_reduce(largest.clone(), self.axis, "max")
        factor = (limit / largest.clamp_min(limit)).nan_to_num(1.0)
        for box, head, exponent in self._scaled:
            rows = factor[head].pow(exponent)
            box.tensor.mul_(rows.view(-1, *[1] * (box.tensor.dim() - 1)))
