"""The engine's own kernels behind plain functions, each beside its plain PyTorch reference."""

from megalm.ops.activation import geglu, swiglu
from megalm.ops.backend import backend, keep_freed_memory, set_backend, use_backend
from megalm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalm.ops.rope import rotary

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "geglu",
    "keep_freed_memory",
    "layer_norm",
    "rms_norm",
    "rotary",
    "set_backend",
    "swiglu",
    "use_backend",
]
