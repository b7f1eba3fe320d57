"""Softmax attention in its kinds: full or within a window, with sinks, with capped scores, over the context axis."""

from torch import Tensor

from megalm.model.positions import Where
from megalm.ops.attention import Inputs, widen
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel.context import context_attention
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
