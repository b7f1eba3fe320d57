"""Causal self-attention with grouped key/value heads, over the tensor and context axes."""

from torch import Tensor, nn

from megalm import ops
from megalm.architecture.blocks import AttentionSpec, NormSpec
from megalm.model.attention_core import AttentionCore
from megalm.model.head_norm import AllHeadsNorm, EachHeadNorm, HeadNorm
from megalm.model.heads import locate_key_value_heads, query_heads
from megalm.model.positions import Where
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear, split_rows


class Attention(AttentionCore):
    """y = W_o softmax(scale q k^T + bias) v, causal; each tensor rank holds A/t query heads (see `megalm.model.heads`).

    Shapes:  x [S/t or S, B, H] -> y the same;  q [S/c, B, A/t, d];  k, v [S/c, B, max(K/t, 1), d]
    Comm:    those of the column- and row-parallel projections; key/value exchange over the context axis
    Source:  Vaswani et al. 2017; Ainslie et al. 2023 (arXiv:2305.13245) for grouped heads
    """

    def __init__(self, spec: AttentionSpec, context: LayerContext, *, name: str) -> None:
        tensor = context.tensor
        queries = query_heads(spec, tensor, f"{name}.query")
        super().__init__(spec, context, name=name, local_heads=split_rows(queries, tensor)[2] // spec.head_dim)
        self.spec = spec
        self.qkv = ColumnParallelLinear(
            spec.hidden_size,
            [
                queries,
                locate_key_value_heads(spec, tensor, f"{name}.key"),
                locate_key_value_heads(spec, tensor, f"{name}.value"),
            ],
            tensor,
            bias=spec.qkv_bias,
            init_std=spec.init_std,
            product=context.product(f"{name}.qkv"),
            **context.of_layers,
        )
        self.output = RowParallelLinear(
            queries.features,
            spec.hidden_size,
            tensor,
            name=f"{name}.output",
            unit=queries.unit,
            uneven=queries.uneven,
            bias=spec.output_bias,
            init_std=spec.output_init_std,
            product=context.product(f"{name}.output", shares_input=True),  # attention keeps what it gives
            **context.of_layers,
        )
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if spec.query_norm is not None:
            heads = query_heads(spec, tensor, f"{name}.query_norm")
            self.query_norm = _head_norm(spec.query_norm, heads, spec.head_dim, context)
        if spec.key_norm is not None:
            heads = locate_key_value_heads(spec, tensor, f"{name}.key_norm")
            self.key_norm = _head_norm(spec.key_norm, heads, spec.head_dim, context)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        return self.output(self.attend(self.qkv(x), where))

    def attend(self, qkv: Tensor, where: Where) -> Tensor:
        """From the stacked projections [S, B, (A + 2K)/t d] to the heads' outputs [S, B, A/t d]."""
        return self.compute_core(self._core, qkv, where=where)

    def _core(self, qkv: Tensor, where: Where) -> Tensor:
        spec = self.spec
        q, k, v = self.heads(qkv)
        if spec.rope is not None:
            cos, sin = where.rotary[spec.rope]
            q = ops.rotary(q, cos, sin, interleaved=spec.rope.interleaved)
            k = ops.rotary(k, cos, sin, interleaved=spec.rope.interleaved)
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        return self.mix(q, k, v, where)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the stack into q [S, B, A/t, d] and k, v [S, B, K/t, d], clamped and normalised as configured."""
        if self.spec.clip_qkv is not None:
            qkv = qkv.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
        q, k, v = (part.unflatten(-1, (-1, self.spec.head_dim)) for part in qkv.split(self.qkv.split_sizes, dim=-1))
        return self.query_norm(q), self.key_norm(k), v


def _head_norm(norm: NormSpec, heads: Output, head_dim: int, context: LayerContext) -> nn.Module:
    made = context.of_parameters
    if norm.scope == "head":
        return HeadNorm(
            norm.kind, norm.size, context.tensor, name=heads.name, eps=norm.eps, unit_offset=norm.unit_offset, **made
        )
    if norm.scope == "each":
        return EachHeadNorm(norm, heads, head_dim, context.tensor, **made)
    return AllHeadsNorm(heads, context.tensor, eps=norm.eps, unit_offset=norm.unit_offset, **made)
