"""Liger-Kernel's functions with our ops' arguments, where it is installed: it needs Triton, and so a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor


def find_liger_functions() -> dict[str, Callable[..., Any]]:
    """By our op's name; empty where Liger-Kernel is not installed."""
    try:
        liger = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return {}

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return liger.liger_rms_norm(x, weight, eps, in_place=False)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        return liger.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)

    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        h = x + residual
        return liger.liger_layer_norm(h, weight, bias, eps), h

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return liger.liger_swiglu(gate.contiguous(), up.contiguous())

    def geglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return liger.liger_geglu(gate.contiguous(), up.contiguous())

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        # Its backward writes over the logits.
        return liger.liger_cross_entropy(logits.clone(), labels, reduction="none")

    functions: dict[str, Callable[..., Any]] = {
        "rms_norm": rms_norm,
        "add_layer_norm": add_layer_norm,
        "swiglu": swiglu,
        "geglu": geglu,
        "cross_entropy": cross_entropy,
    }
    if hasattr(liger, "liger_fused_add_rms_norm"):
        functions["add_rms_norm"] = add_rms_norm
    return functions
