"""The engine's own kernels behind plain functions, each beside its plain PyTorch reference."""

from megalm.ops.activation import bias_gelu, geglu, swiglu
from megalm.ops.adamw import adamw_
from megalm.ops.backend import current_backend, keep_freed_memory, set_backend, use_backend
from megalm.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_statistics,
    join_statistics,
    linear_cross_entropy,
)
from megalm.ops.gradient_norm import l2_norm_nonfinite
from megalm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalm.ops.rope import rotary

__all__ = [
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "current_backend",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_gradient",
    "cross_entropy_statistics",
    "geglu",
    "join_statistics",
    "keep_freed_memory",
    "l2_norm_nonfinite",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "set_backend",
    "swiglu",
    "use_backend",
]
