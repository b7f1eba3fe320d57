"""Softmax attention in its kinds: full or within a window, with sinks, with capped scores, over the context axis."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.model.positions import Where
from megalm.parallel.context import context_attention
from megalm.parallel.mesh import Axis

_ALIGNED = 8
"""Features that sinks add to a head: one is needed, and kernels want multiples of 8."""


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
    context: Axis,
    context_mode: str,
) -> Tensor:
    """softmax(cap(scale q k^T) + bias) v: causal, within the window and the document, a sink's share thrown away.

    k and v may begin before q (a cache): the queries are the last of the keys' positions.

    Shapes:  q [S, B, A, d], k [K, B, G, d], v [K, B, G, e], sinks [A] -> [S, B, A, e]; A a multiple of G
    Comm:    over a context axis of several ranks that of `context_attention`
    """
    if context.size > 1:
        return _over_context(q, k, v, where, scale, window, softcap, sinks, context, context_mode)
    mask = where.mask(window)
    if mask is not None:
        mask = mask[..., -k.shape[0] :]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    if softcap is not None:
        return _capped(q, k, v, mask, scale, softcap, sinks).permute(2, 0, 1, 3)
    queries, values = q.shape[2], v.shape[-1]
    q, k, v = _widen(q, k, v)
    if sinks is not None:
        q, k, v, mask = _add_sinks(q, k, v, mask, scale, sinks)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The kernel that serves masks and fp32 on GPUs knows no groups: without this all scores would be in memory.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = False
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scale
    )
    return mixed[:, :, -queries:, :values].permute(2, 0, 1, 3)


def _widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give values and keys one width, by zeros that change nothing: fused kernels know only one."""
    width = max(k.shape[-1], v.shape[-1])
    q, k, v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    return q, k, v


def _add_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put a key before the others whose score is the head's sink, and whose value is 0; any kernel then serves.

    Heads get further features: the sink in the query, 1 in the key before all others and 0 in the rest. Where causality
    needs no mask it needs none then either: a query without meaning goes before the others.
    """
    batch, heads, queries, _ = q.shape
    shift = (sinks / scale).to(q.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
    q = torch.cat([q, F.pad(shift, (0, _ALIGNED - 1))], -1)
    first = F.pad(k.new_ones(1), (k.shape[-1], _ALIGNED - 1)).expand(batch, k.shape[1], 1, -1)
    k = torch.cat([first, F.pad(k, (0, _ALIGNED))], 2)
    v = F.pad(v, (0, _ALIGNED, 1, 0))
    if mask is None:
        return F.pad(q, (0, 0, 1, 0)), k, v, None
    return q, k, v, F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention with scores in memory, fp32: no fused kernel of torch's caps them.

    Shapes:  q [B, A, S, d], k, v [B, G, K, d], sinks [A] -> [B, A, S, d]
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return weights @ v


def _over_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Where,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    context: Axis,
    context_mode: str,
) -> Tensor:
    values = v.shape[-1]
    mixed = context_attention(
        *_widen(q, k, v),
        context,
        causal=True,
        scale=scale,
        alibi_slopes=where.slopes,
        document_ids=where.documents,
        window=window,
        softcap=softcap,
        sinks=sinks,
        mode=context_mode,
    )
    return mixed[..., :values]
