"""Softmax attention in its kinds: full or within a window, with sinks, with capped scores, over the context axis."""

from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megalm import ops
from megalm.architecture.blocks import AttentionSpec
from megalm.model.cache import KeyValueCache
from megalm.model.heads import make_head_parameter
from megalm.model.positions import Where
from megalm.ops.attention import Inputs, widen
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel.context import context_attention
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Axis


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Where,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    kernels: AttentionChoice,
    context: Axis,
    context_mode: str,
) -> Tensor:
    """softmax(cap(scale q k^T) + bias) v: causal, within the window and the document, a sink's share thrown away.

    k and v may begin before q (a cache): the queries are the last of the keys' positions. kernels: chooses what computes it.

    Shapes:  q [S, B, A, d], k [K, B, G, d], v [K, B, G, e], sinks [A] -> [S, B, A, e]; A a multiple of G
    Comm:    over a context axis of several ranks that of `context_attention`
    """
    if context.size == 1:
        mask = where.mask(window, q, k)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return kernels(Inputs(q, k, v, mask, scale, softcap, sinks)).permute(2, 0, 1, 3)
    values = v.shape[-1]
    mixed = context_attention(
        *widen(q, k, v),
        context,
        scale=scale,
        alibi_slopes=where.slopes,
        document_ids=where.documents,
        window=window,
        softcap=softcap,
        sinks=sinks,
        kernels=kernels,
        mode=context_mode,
    )
    return mixed[..., :values]


class AttentionCore(nn.Module):
    """What every kind of attention does with the queries, keys and values that it has made.

    A kind derives from it, makes them of the hidden state, and hands them to `mix`. `local_heads`: query heads of this rank.
    """

    def __init__(self, spec: AttentionSpec, context: LayerContext, *, name: str, local_heads: int) -> None:
        super().__init__()
        self.local_heads = local_heads
        self.context, self.context_mode = context.mesh.context, context.parallel.context_mode
        self.scale, self.window, self.softcap = spec.scale, spec.window, spec.softcap
        self.sinks: nn.Parameter | None = None
        if spec.sinks:
            self.sinks = make_head_parameter(spec, context.tensor, f"{name}.sinks", **context.of_parameters)
        self.recompute_core = context.recompute_parts
        self.kernels = context.attention_kernels
        self.cache: KeyValueCache | None = None  # set while text is generated: see megalm.model.cache
        self.largest_logit: Tensor | None = None  # [A/t] where it is watched: see megalm.ops.attention_logit

    def compute_core(self, core: Callable[..., Tensor], *inputs: Tensor, where: Where) -> Tensor:
        """core(*inputs, where); computed again in backward, so that only the inputs are kept, where that is configured."""
        if self.recompute_core and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                core, *inputs, where, use_reentrant=False, preserve_rng_state=False
            )
        return core(*inputs, where)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """What the heads put out, side by side; their largest logits are noted where they are watched.

        Shapes:  q [S, B, A/t, d], k [K, B, G/t, d], v [K, B, G/t, e] -> [S, B, A/t e]
        Comm:    that of `attend`
        """
        if self.largest_logit is not None and self.training:
            seen = where.mask(self.window, q, k).visible() if self.context.size == 1 else None
            ops.largest_logits_(self.largest_logit, q, k, self.scale, seen)
        mixed = attend(
            q,
            k,
            v,
            where,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            kernels=self.kernels,
            context=self.context,
            context_mode=self.context_mode,
        )
        return mixed.flatten(2)
