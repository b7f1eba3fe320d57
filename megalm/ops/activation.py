"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def swiglu(x: Tensor) -> Tensor:
    return swiglu_reference(x)


def geglu(x: Tensor) -> Tensor:
    return geglu_reference(x)
