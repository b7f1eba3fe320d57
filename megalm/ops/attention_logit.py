"""The largest attention logits, watched while training goes on: they grow for a long time before a run diverges.

Contract: csrc/attention_logit/op.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native

QUERIES = 8
"""Queries of each sequence that are looked at: evenly spaced, the last one among them."""


def largest_logits_reference_(largest: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> None:
    length, batch, heads, _ = q.shape
    groups = k.shape[2]
    at = torch.arange(length - 1, -1, -_every(length), device=q.device)
    few = q[at].unflatten(2, (groups, heads // groups)).permute(1, 2, 4, 3, 0)  # [B, K, d, A/K, n]
    products = k.permute(1, 2, 0, 3) @ few.flatten(3)  # [B, K, S, (A/K) n]; keys are read where they are
    products = products.unflatten(3, (heads // groups, len(at))).float()
    hidden = (torch.arange(length, device=q.device)[:, None] > at)[:, None]
    if mask is not None:
        unseen = ~mask[..., at, :].expand(batch, 1, len(at), length).transpose(2, 3)[:, :, :, None]
        hidden = hidden | unseen
    seen = products.masked_fill_(hidden, -torch.inf).amax(dim=(0, 2, 4)) * scale
    torch.maximum(largest, seen.flatten(), out=largest)


@torch.no_grad()
def largest_logits_(largest: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Raise `largest` to each head's largest q k^T scale, over QUERIES queries of every sequence and all keys they see.

    With fewer than 2 QUERIES positions, a few queries more or less. Biases (ALiBi) are not counted. NaN stays.

    Shapes: largest fp32 [A], q [S, B, A, d], k [S, B, K, d] (A a multiple of K; any strides of S and B),
            mask bool [S, S], [1 or B, 1, S, S], true where a key is seen, beside causality -> largest
    Source: Wortsman et al. 2023 (arXiv:2309.14322), section 3.1.1, for what the number foretells
    """
    length, batch, heads, size = q.shape
    fits = k.dim() == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == size and heads % k.shape[2] == 0
    require(
        fits,
        f"largest_logits_: q is {tuple(q.shape)} and k {tuple(k.shape)}; they are [positions, batch, heads, size] and "
        "[positions, batch, key heads, size], with heads a multiple of the key heads.",
    )
    require(
        largest.shape == (heads,) and largest.dtype == torch.float32 and largest.is_contiguous(),
        f"largest_logits_: largest is {largest.dtype} {tuple(largest.shape)}; it must be dense float32 [{heads}].",
    )
    require(
        mask is None
        or (
            mask.dtype == torch.bool
            and mask.shape in ((length, length), (1, 1, length, length), (batch, 1, length, length))
        ),
        f"largest_logits_: mask is {None if mask is None else (mask.dtype, tuple(mask.shape))}; it must be bool "
        f"[{length}, {length}] or [1 or {batch}, 1, {length}, {length}].",
    )
    if q.numel() == 0:
        return largest
    if not use_native("largest_logits_", q=q, k=k) or not _native(largest, q, k, scale, mask):
        largest_logits_reference_(largest, q, k, scale, mask)
    return largest


def _every(length: int) -> int:
    return max(1, length // QUERIES)


def _native(largest: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> bool:
    """False for what the kernel does not take: very long heads, a scale that turns the order round, other devices."""
    length, batch, heads, size = q.shape
    library = get_library()
    if size > library.ATTENTION_LOGIT_SIZE or not scale > 0 or largest.device != q.device:
        return False
    if mask is not None and mask.device != q.device:
        return False
    q, k = (t if t.stride()[2:] == (size, 1) else t.contiguous() for t in (q, k))
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    groups, every = k.shape[2], _every(length)
    queries = -(-length // every)
    (q_step, q_batch), (k_step, k_batch) = q.stride()[:2], k.stride()[:2]
    mask_step = 0 if mask is None else mask.stride(-2)
    mask_batch = 0 if mask is None or mask.dim() == 2 or mask.shape[0] == 1 else mask.stride(0)
    library.attention_logit(
        *place(q),
        DTYPE_CODES[q.dtype],
        length,
        batch,
        heads,
        groups,
        size,
        queries,
        every,
        scale,
        find_address(q),
        find_address(k),
        q_step,
        q_batch,
        k_step,
        k_batch,
        find_address(mask),
        mask_step,
        mask_batch,
        find_address(largest),
    )
    return True
