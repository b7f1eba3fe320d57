"""Attention whose keys and values come out of one small vector for each token (multi-head latent attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm import ops
from megalm.architecture.blocks import LatentAttentionSpec
from megalm.model.attention_core import AttentionCore
from megalm.model.norm import make_norm
from megalm.model.positions import Where
from megalm.parallel import collectives
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ColumnParallelLinear, Output, ReplicatedLinear, RowParallelLinear, split_rows


class LatentAttention(AttentionCore):
    """y = W_o softmax(scale q k^T) v, causal, with each head's k and v made of a latent c that all heads share:

        q = W_q norm(W_qd x)  (or W_q x);  [c, r] = W_kvd x;  [k', v] = W_kvu norm(c);  k = [k', rope(r)]

    The last `rope_dim` features of queries and keys are rotated; those of the keys are one vector r for all heads. A cache
    keeps norm(c) and rope(r): key_rank + rope_dim numbers a token.
    Each tensor rank holds A/t heads of W_q, W_kvu and W_o; what makes the latents is whole on every rank. Under sequence
    parallelism a rank makes the latents of its own positions, and the gradients of these weights are summed over the axis.

    Shapes:  x [S/t or S, B, H] -> y the same;  q, k [S, B, A/t, n + r];  v [S, B, A/t, e];  c [S/t or S, B, R]
    Comm:    those of the column- and row-parallel projections, of latents in place of hidden states; for r an all-gather(S)
             forward and a reduce-scatter(S) backward under sequence parallelism, else an all-reduce backward
    Source:  DeepSeek-V2 (arXiv:2405.04434), sec. 2.1
    """

    def __init__(self, spec: LatentAttentionSpec, context: LayerContext, *, name: str) -> None:
        queries = Output(name, spec.num_heads, uneven=True)
        super().__init__(spec, context, name=name, local_heads=split_rows(queries, context.tensor)[2])
        self.spec = spec
        self.tensor, self.sequence = context.tensor, context.sequence
        self.query_down: ReplicatedLinear | None = None
        if spec.query_rank is not None and spec.query_down_norm is not None:
            self.query_down = self._replicated(spec.query_rank, f"{name}.query_down", context)
            self.query_down_norm = make_norm(spec.query_down_norm, context, name=f"{name}.query_down_norm")
        width = spec.query_rank or spec.hidden_size
        query_name = f"{name}.query_up" if spec.query_rank is not None else f"{name}.query"
        self.query_up = self._by_heads(width, spec.head_dim, query_name, context)
        self.key_value_down = self._replicated(spec.key_rank + spec.rope_dim, f"{name}.key_value_down", context)
        self.key_value_norm = make_norm(spec.key_value_norm, context, name=f"{name}.key_value_norm")
        up_width = spec.plain_dim + spec.value_dim
        self.key_value_up = self._by_heads(spec.key_rank, up_width, f"{name}.key_value_up", context)
        self.output = RowParallelLinear(
            spec.num_heads * spec.value_dim,
            spec.hidden_size,
            context.tensor,
            name=f"{name}.output",
            unit=spec.value_dim,
            uneven=True,
            bias=False,
            init_std=spec.output_init_std,
            product=context.product(f"{name}.output", shares_input=True),  # attention keeps what it gives
            **context.of_layers,
        )

    def forward(self, x: Tensor, where: Where) -> Tensor:
        latent = x if self.query_down is None else self.query_down_norm(self.query_down(x))
        q = self.query_up(latent).unflatten(-1, (-1, self.spec.head_dim))
        c, shared = self.key_value_down(x).split([self.spec.key_rank, self.spec.rope_dim], dim=-1)
        c = self.key_value_norm(c.contiguous())
        # Every rank's heads use the shared part: its gradient is the sum of theirs.
        spread = collectives.gather if self.sequence else collectives.copy
        shared = spread(shared.contiguous(), self.tensor).unsqueeze(2)
        if self.spec.rope is not None:
            cos, sin = where.rotary[self.spec.rope]
            shared = ops.rotary(shared, cos, sin, interleaved=self.spec.rope.interleaved)
        if self.cache is not None:
            c, shared = self.cache.append(c, shared)
        expanded = self.key_value_up(c)
        return self.output(self.compute_core(self._core, q, expanded, shared, where=where))

    def _core(self, q: Tensor, expanded: Tensor, shared: Tensor, where: Where) -> Tensor:
        spec = self.spec
        if spec.rope is not None:
            cos, sin = where.rotary[spec.rope]
            plain, turning = q.split([spec.plain_dim, spec.rope_dim], dim=-1)
            turned = ops.rotary(turning.contiguous(), cos, sin, interleaved=spec.rope.interleaved)
            q = torch.cat([plain, turned], -1)
        expanded = expanded.unflatten(-1, (-1, spec.plain_dim + spec.value_dim))
        k, v = expanded.split([spec.plain_dim, spec.value_dim], dim=-1)
        k = torch.cat([k, shared.expand(-1, -1, k.shape[2], -1)], -1)
        return self.mix(q, k, v, where)

    def _replicated(self, features: int, name: str, context: LayerContext) -> ReplicatedLinear:
        return ReplicatedLinear(
            self.spec.hidden_size,
            features,
            context.tensor,
            name=name,
            init_std=self.spec.init_std,
            product=context.product(name),
            **context.of_layers,
        )

    def _by_heads(self, width: int, each: int, name: str, context: LayerContext) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            width,
            [Output(name, self.spec.num_heads * each, unit=each, uneven=True)],
            context.tensor,
            bias=False,
            init_std=self.spec.init_std,
            product=context.product(name),
            **context.of_layers,
        )
