"""The largest attention logit, watched while training goes on: it grows for a long time before a run diverges."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 8
"""Queries of each sequence that are looked at: evenly spaced, the last one among them."""


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Largest q k^T scale of each head, exact over QUERIES queries of every sequence and all keys that they may see.

    Biases (ALiBi) are not counted. Under context parallelism the keys are those of this rank's positions.

    Shapes: q [S, B, A/t, d], k [S, B, K/t, d], mask as in `Where` -> fp32 [A/t]
    Source: Wortsman et al. 2023 (arXiv:2309.14322), sec. 3.1.1, for what it foretells
    """
    length, batch, heads, _ = q.shape
    groups = k.shape[2]
    stride = max(1, length // QUERIES)
    at = torch.arange(length - 1, -1, -stride, device=q.device)
    few = q[at].unflatten(2, (groups, heads // groups)).permute(1, 2, 3, 0, 4)  # [B, K, A/K, n, d]
    products = few.flatten(2, 3) @ k.permute(1, 2, 3, 0)  # [B, K, (A/K) n, S]
    products = products.unflatten(2, (heads // groups, len(at))).float()
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask[..., at, -length:].expand(batch, 1, len(at), length)[:, :, None]
    else:
        hidden = torch.arange(length, device=q.device) > at[:, None]
    largest = products.masked_fill_(hidden, -torch.inf).amax(dim=(0, 3, 4)) * scale
    return largest.flatten()
