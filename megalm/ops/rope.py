"""Rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        parts = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        parts = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    parts = parts.to(x.dtype)
    return torch.cat((parts, rest), dim=-1) if rest.shape[-1] else parts


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return rotary_reference(x, cos, sin, interleaved)
