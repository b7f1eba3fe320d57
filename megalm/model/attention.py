"""Causal self-attention with grouped key/value heads, over the tensor and context axes."""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from megalm import ops
from megalm.architecture.blocks import AttentionSpec, NormSpec
from megalm.model.cache import KeyValueCache
from megalm.model.head_norm import AllHeadsNorm, HeadNorm
from megalm.model.heads import key_value_heads, query_heads
from megalm.model.positions import Where
from megalm.parallel.context import context_attention
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear


class Attention(nn.Module):
    """y = W_o softmax(q k^T / sqrt(d) + bias) v, causal; each tensor rank holds A/t query heads (see `megalm.model.heads`).

    Shapes:  x [S/t or S, B, H] -> y the same;  q [S/c, B, A/t, d];  k, v [S/c, B, max(K/t, 1), d]
    Comm:    those of the column- and row-parallel projections; key/value exchange over the context axis
    Source:  Vaswani et al. 2017; Ainslie et al. 2023 (arXiv:2305.13245) for grouped heads
    """

    def __init__(self, spec: AttentionSpec, context: LayerContext, *, name: str) -> None:
        super().__init__()
        self.spec = spec
        tensor = context.tensor
        self.context = context.mesh.context
        self.context_mode = context.parallel.context_mode
        queries = query_heads(spec, tensor, f"{name}.query")
        self.qkv = ColumnParallelLinear(
            spec.hidden_size,
            [
                queries,
                key_value_heads(spec, tensor, f"{name}.key"),
                key_value_heads(spec, tensor, f"{name}.value"),
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
            product=context.product(f"{name}.output"),
            **context.of_layers,
        )
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if spec.query_norm is not None:
            heads = query_heads(spec, tensor, f"{name}.query_norm")
            self.query_norm = _head_norm(spec.query_norm, heads, context)
        if spec.key_norm is not None:
            heads = key_value_heads(spec, tensor, f"{name}.key_norm")
            self.key_norm = _head_norm(spec.key_norm, heads, context)
        self.recompute_core = context.recompute_parts
        self.cache: KeyValueCache | None = None  # set while text is generated: see megalm.model.cache
        self.largest_logit: Tensor | None = None  # [A/t] where it is watched: see megalm.ops.attention_logit

    def forward(self, x: Tensor, where: Where) -> Tensor:
        return self.output(self.attend(self.qkv(x), where))

    def attend(self, qkv: Tensor, where: Where) -> Tensor:
        """From the stacked projections [S, B, (A + 2K)/t d] to the heads' outputs [S, B, A/t d]."""
        if self.recompute_core and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                self._core, qkv, where, use_reentrant=False, preserve_rng_state=False
            )
        return self._core(qkv, where)

    def _core(self, qkv: Tensor, where: Where) -> Tensor:
        q, k, v = self.heads(qkv)
        if where.rotary is not None:
            cos, sin = where.rotary
            q = ops.rotary(q, cos, sin, interleaved=self.spec.rope_interleaved)
            k = ops.rotary(k, cos, sin, interleaved=self.spec.rope_interleaved)
        if self.largest_logit is not None and self.training:
            mask = (
                where.mask if where.mask is None or where.mask.dtype == torch.bool else None
            )  # else it is causal, with biases
            ops.largest_logits_(self.largest_logit, q, k, self.spec.head_dim**-0.5, mask)
        return self._mix(q, k, v, where).flatten(2)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the stack into q [S, B, A/t, d] and k, v [S, B, K/t, d], clamped and normalised as configured."""
        if self.spec.clip_qkv is not None:
            qkv = qkv.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
        q, k, v = (part.unflatten(-1, (-1, self.spec.head_dim)) for part in qkv.split(self.qkv.split_sizes, dim=-1))
        return self.query_norm(q), self.key_norm(k), v

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        if self.context.size > 1:
            return context_attention(
                q,
                k,
                v,
                self.context,
                causal=True,
                scale=self.spec.head_dim**-0.5,
                alibi_slopes=where.slopes,
                document_ids=where.documents,
                mode=self.context_mode,
            )
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        if grouped and q.is_cuda and (where.mask is not None or q.dtype == torch.float32):
            # The kernel that serves masks and fp32 on GPUs knows no groups: without this all scores would be in memory.
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            grouped = False
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=where.mask,
            is_causal=where.mask is None,
            enable_gqa=grouped,
            scale=self.spec.head_dim**-0.5,
        )
        return mixed.permute(2, 0, 1, 3)


def _head_norm(norm: NormSpec, heads: Output, context: LayerContext) -> nn.Module:
    made = context.of_parameters
    if norm.scope == "head":
        return HeadNorm(norm.kind, norm.size, context.tensor, name=heads.name, eps=norm.eps, **made)
    return AllHeadsNorm(heads, context.tensor, eps=norm.eps, **made)
