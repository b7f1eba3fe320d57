"""QK-clip: heads whose attention logits grow too large get smaller query and key weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.model.attention import Attention
from megalm.model.latent_attention import LatentAttention
from megalm.parallel import collectives
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Box, Piece, slice_of


@dataclass(frozen=True)
class _Scaled:
    """Rows of a master that follow the factors of their heads: each by factor[head] ** exponent."""

    box: Box
    head: Tensor
    """Place of each row's head among the heads of all layers."""
    exponent: Tensor


class LogitClip:
    """Scales a head's logits by limit / largest, through its weights: where each query head has its own keys, both
    projections by the square root; where query heads share keys, the query's alone, so that no other head changes.

    Of latent attention, whose heads share the rotated part of the keys: the part of queries and keys that is not rotated
    by the square root each, the rotated part of the queries by the whole; values, which lie beside the keys, not at all.
    The fp32 masters are scaled, before the update that gives the rounded weights anew; the largest logit is that of
    the forward pass with just these weights.

    Source: Kimi K2 2025 (MuonClip, arXiv:2507.20534), sec. 2.1
    """

    def __init__(self, layers: Sequence[Attention | LatentAttention], boxes: Sequence[Box], mesh: Mesh) -> None:
        self.axis, self.device = mesh.data_context, mesh.device
        self._scaled: list[_Scaled] = []
        by_name: dict[str, list[Box]] = {}
        for box in boxes:
            if ".attention." in box.name:
                by_name.setdefault(box.name, []).append(box)
        first = 0
        for layer in layers:
            for linear, exponents in _list_scaled(layer):
                name, start = linear.name.removesuffix(".weight"), linear.offset[0]
                for each in (f"{name}.weight", f"{name}.bias"):
                    for box in by_name.get(each, ()):
                        self._add(box, start, first, exponents)
            first += layer.local_heads

    def _add(self, box: Box, start: int, first: int, exponents: Sequence[float]) -> None:
        """start: first row of this rank's heads, of whose rows each has one of the exponents; first: their place."""
        rows = torch.arange(box.tensor.shape[0], device=self.device) + box.offset[0] - start
        width = len(exponents)
        each = torch.tensor(exponents, device=self.device)[rows % width]
        self._scaled.append(_Scaled(box, rows // width + first, each))

    @torch.no_grad()
    def apply(self, largest: Tensor, limit: float) -> None:
        """Scale what exceeds the limit. Call it on every rank alike, between statistics() and step().

        Shapes: largest [heads of all layers on this rank], as seen on this rank's tokens
        Comm:   one all-reduce (max) of `largest` over data x context
        """
        largest = collectives.all_reduce(largest.clone(), self.axis, "max")
        factor = (limit / largest.clamp_min(limit)).nan_to_num(1.0)
        for scaled in self._scaled:
            rows, tensor = factor[scaled.head].pow(scaled.exponent), scaled.box.tensor
            tensor.mul_(rows.view(-1, *[1] * (tensor.dim() - 1)))


def _list_scaled(layer: Attention | LatentAttention) -> Iterator[tuple[Piece, list[float]]]:
    """Yield this rank's part of each projection to be scaled, and the exponents of one head's rows."""
    if isinstance(layer, LatentAttention):
        latent = layer.spec
        yield slice_of(layer.query_up.weight).pieces[0], [0.5] * latent.plain_dim + [1.0] * latent.rope_dim
        yield slice_of(layer.key_value_up.weight).pieces[0], [0.5] * latent.plain_dim + [0.0] * latent.value_dim
        return
    spec = layer.spec
    query, key, _ = slice_of(layer.qkv.weight).pieces
    shared = spec.num_kv_heads != spec.num_heads
    yield query, [1.0 if shared else 0.5] * spec.head_dim
    if not shared:
        yield key, [0.5] * spec.head_dim
