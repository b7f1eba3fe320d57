"""The engine's own kernels behind plain functions, each beside its plain PyTorch reference."""

from megalm.ops.activation import bias_gelu, geglu, swiglu
from megalm.ops.adamw import Segments, adamw_, update_clipping_rates, update_squares
from megalm.ops.attention_logit import largest_logits_
from megalm.ops.backend import get_backend, keep_freed_memory, set_backend, use_backend
from megalm.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_statistics,
    join_statistics,
)
from megalm.ops.dropout import bias_dropout_add
from megalm.ops.gradient_norm import l2_norm_nonfinite
from megalm.ops.grouped_mm import grouped_mm
from megalm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_parts
from megalm.ops.moe_permute import RowMap, moe_permute, moe_row_map, moe_unpermute
from megalm.ops.moe_router import Routing, load_balance_loss, moe_router, router_z_loss
from megalm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalm.ops.quantize import DelayedScale, Quantized, fp8_dequantize, fp8_quantize
from megalm.ops.rope import rotary, rotary_
from megalm.ops.scaled_mm import Scaled, scaled_mm
from megalm.ops.sequence import sequence_join, sequence_pack, sequence_part, sum_parts
from megalm.ops.softmax import causal_softmax, find_document_starts

__all__ = [
    "DelayedScale",
    "Quantized",
    "Routing",
    "RowMap",
    "Scaled",
    "Segments",
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "get_backend",
    "bias_dropout_add",
    "bias_gelu",
    "causal_softmax",
    "cross_entropy",
    "cross_entropy_gradient",
    "cross_entropy_statistics",
    "find_document_starts",
    "fp8_dequantize",
    "fp8_quantize",
    "geglu",
    "grouped_mm",
    "join_statistics",
    "keep_freed_memory",
    "l2_norm_nonfinite",
    "largest_logits_",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_parts",
    "load_balance_loss",
    "moe_permute",
    "moe_router",
    "moe_row_map",
    "moe_unpermute",
    "rms_norm",
    "rotary",
    "router_z_loss",
    "rotary_",
    "scaled_mm",
    "sequence_join",
    "sequence_pack",
    "sequence_part",
    "set_backend",
    "sum_parts",
    "swiglu",
    "update_clipping_rates",
    "update_squares",
    "use_backend",
]
