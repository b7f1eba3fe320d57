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
    few = q[at].unflatten(2, (groups, heads // groups)).permute(1, 2, 4, 3, 0)  # [B, K, d, A/K, n]
    products = k.permute(1, 2, 0, 3) @ few.flatten(3)  # [B, K, S, (A/K) n]; keys are read where they are
    products = products.unflatten(3, (heads // groups, len(at))).float()
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask[..., at, -length:].expand(batch, 1, len(at), length).transpose(2, 3)[:, :, :, None]
    else:
        hidden = (torch.arange(length, device=q.device)[:, None] > at)[:, None]
    largest = products.masked_fill_(hidden, -torch.inf).amax(dim=(0, 2, 4)) * scale
    return largest.flatten()
