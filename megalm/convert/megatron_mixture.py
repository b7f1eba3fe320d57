"""Megatron-LM's arguments of a mixture of experts <-> MoEConfig.

How Megatron chooses (megatron-core `topk_routing_with_score_function`): softmax scores are taken of the chosen logits, so
that they sum to 1, or with `moe_router_pre_softmax` of all; sigmoid scores are divided by their sum where more than one is
chosen. A group of experts is judged by the sum of its top_k / group_topk best scores.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.config.mixture import check_mixture
from megalm.config.model import MoEConfig

Get = Callable[..., Any]

_LEVELS = {"aux_loss": "micro_batch", "seq_aux_loss": "sequence", "global_aux_loss": "global"}
_LEVEL_NAMES = {ours: theirs for theirs, ours in _LEVELS.items()}
_WITHOUT = (
    ("moe_expert_capacity_factor", None),
    ("moe_router_topk_limited_devices", None),
    ("moe_input_jitter_eps", None),
    ("moe_latent_size", None),
    ("moe_use_legacy_grouped_gemm", False),
    ("moe_apply_probs_on_input", False),
)
"""What changes the function or the names and has no counterpart, with the only value that is read."""


def read_mixture(get: Get, num_layers: int, ffn_hidden_size: int) -> MoEConfig:
    """Read a mixture's arguments; `get(name, default)` looks one up. Errors: ConfigError for what has no counterpart."""
    for key, allowed in _WITHOUT:
        if get(key, allowed) != allowed:
            raise ConfigError(f"Megatron argument {key}={get(key)!r} is not supported; allowed: {allowed!r}")
    if get("add_bias_linear", True):
        raise ConfigError("Megatron argument add_bias_linear=True is not supported with num_experts; allowed: False")
    score = get("moe_router_score_function", "softmax")
    if score not in ("softmax", "sigmoid"):
        raise ConfigError(
            f"Megatron argument moe_router_score_function={score!r} is not supported; supported: softmax, sigmoid"
        )
    top_k = int(get("moe_router_topk", 2))
    before = bool(get("moe_router_pre_softmax", False))
    normalised = top_k > 1 if score == "sigmoid" else not before
    moe = MoEConfig(
        num_experts=int(get("num_experts")),
        top_k=top_k,
        ffn_hidden_size=int(get("moe_ffn_hidden_size", ffn_hidden_size)),
        shared_ffn_hidden_size=get("moe_shared_expert_intermediate_size"),
        shared_gate=bool(get("moe_shared_expert_gate", False)),
        dense_layers=_read_dense_layers(get("moe_layer_freq", 1), num_layers),
        score=score,
        weight_norm=1.0 if normalised else None,
        weight_scale=float(get("moe_router_topk_scaling_factor", 1.0)),
        selection_bias=bool(get("moe_router_enable_expert_bias", False)),
        bias_rate=float(get("moe_router_bias_update_rate", 1e-3)),
        z_loss=float(get("moe_z_loss_coeff", 0.0)),
    )
    _read_groups(get, moe, before)
    level, factor = get("moe_router_load_balancing_type", "aux_loss"), get("moe_aux_loss_coeff", 0.0)
    if isinstance(level, str) and isinstance(factor, int | float):
        moe.balance, moe.balance_loss = _LEVELS.get(level, "sequence"), float(factor) if level in _LEVELS else 0.0
    return moe


def _read_groups(get: Get, moe: MoEConfig, before: bool) -> None:
    groups, chosen = get("moe_router_num_groups"), get("moe_router_group_topk")
    if not groups or not chosen or groups == 1:
        return
    if moe.score == "softmax" and not before:
        raise ConfigError(
            f"Megatron argument moe_router_num_groups={groups} is not supported where groups are judged by logits; allowed "
            "with moe_router_pre_softmax or moe_router_score_function=sigmoid"
        )
    moe.groups, moe.top_groups, moe.group_scores = int(groups), int(chosen), moe.top_k // int(chosen)


def _read_dense_layers(frequency: Any, num_layers: int) -> list[int]:
    """moe_layer_freq: a mixture in every n-th layer from the first on, or 1 and 0 for each layer."""
    if isinstance(frequency, int):
        return [layer for layer in range(num_layers) if layer % frequency]
    if not isinstance(frequency, list | tuple) or len(frequency) != num_layers:
        raise ConfigError(
            f"Megatron argument moe_layer_freq={frequency!r} is not supported; supported: a number, or 1 or 0 for each of "
            f"the {num_layers} layers"
        )
    return [layer for layer, mixture in enumerate(frequency) if not mixture]


def write_mixture(model: ModelConfig) -> Namespace:
    """Write the arguments of the model's mixture. What they cannot say is found by reading them back: see write_args."""
    check_mixture(model)
    moe = model.moe
    pattern = [int(not moe.is_dense(layer)) for layer in range(model.num_layers)]
    return Namespace(
        num_experts=moe.num_experts,
        moe_layer_freq=1 if all(pattern) else pattern,
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_shared_expert_gate=moe.shared_gate,
        moe_router_topk=moe.top_k,
        moe_router_pre_softmax=moe.score == "softmax" and moe.weight_norm is None,
        moe_router_score_function=moe.score,
        moe_router_topk_scaling_factor=None if moe.weight_scale == 1.0 else moe.weight_scale,
        moe_router_enable_expert_bias=bool(moe.selection_bias),
        moe_router_bias_update_rate=moe.bias_rate,
        moe_router_num_groups=moe.groups or None,
        moe_router_group_topk=moe.top_groups or None,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type=_LEVEL_NAMES[moe.balance],
        moe_aux_loss_coeff=moe.balance_loss,
        moe_z_loss_coeff=moe.z_loss or None,
    )
