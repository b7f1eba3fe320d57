"""Megatron-LM's arguments, as a checkpoint keeps them, <-> ModelConfig."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

from megalm.config import ModelConfig, RopeScalingConfig
from megalm.config.errors import ConfigError
from megalm.convert.huggingface_config import collect_function
from megalm.convert.megatron_mixture import read_mixture, write_mixture

# Megatron's Llama 3 stretching has these numbers built in.
ROPE_SCALING = RopeScalingConfig(
    kind="llama3", low_frequency_factor=1.0, high_frequency_factor=4.0, original_seq_length=8192
)
POSITIONS = {"rope": "rope", "learned_absolute": "learned", "none": "none"}
POSITION_NAMES = {ours: theirs for theirs, ours in POSITIONS.items()}


def read_args(args: Namespace, vocab_size: int | None = None) -> ModelConfig:
    """Read a checkpoint's arguments into a ModelConfig.

    `vocab_size`: the tokenizer's; None: what the arguments say, else the padded size (the padding then stays in the
    model).
    """

    def get(key: str, default: Any = None) -> Any:
        value = getattr(args, key, None)
        return default if value is None else value

    for key, allowed in (
        ("apply_layernorm_1p", False),
        ("squared_relu", False),
        ("multi_latent_attention", False),
    ):
        if get(key, allowed) != allowed:
            raise ConfigError(f"Megatron argument {key}={get(key)!r} is not supported; allowed: {allowed!r}")
    position = get("position_embedding_type", "learned_absolute")
    if get("use_rotary_position_embeddings", False):
        position = "rope"
    if position not in POSITIONS:
        raise ConfigError(
            f"Megatron argument position_embedding_type={position!r} is not supported; supported: {', '.join(POSITIONS)}"
        )
    missing = [
        key for key in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size") if get(key) is None
    ]
    if missing:
        raise ConfigError(
            f"the checkpoint's arguments lack {', '.join(missing)}: it was not written by Megatron-LM's training"
        )
    longest = get("max_position_embeddings") or get("seq_length")
    seq_length = longest if position == "learned" else get("seq_length") or longest
    bias = bool(get("add_bias_linear", True))
    norm = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}[get("normalization", "LayerNorm")]
    gelu = "gelu_tanh" if get("openai_gelu", False) or (bias and get("bias_gelu_fusion", True)) else "gelu"
    model = ModelConfig(
        name="megatron",
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_heads=args.num_attention_heads,
        num_kv_heads=get("num_query_groups") if get("group_query_attention", False) else args.num_attention_heads,
        head_dim=get("kv_channels"),
        ffn_hidden_size=get("ffn_hidden_size", 4 * args.hidden_size),
        vocab_size=vocab_size or get("vocab_size") or args.padded_vocab_size,
        seq_length=seq_length,
        max_positions=longest if longest > seq_length else None,
        norm=norm,
        norm_bias=norm == "layernorm",
        norm_eps=float(get("norm_epsilon", get("layernorm_epsilon", 1e-5))),
        activation="swiglu" if get("swiglu", False) else gelu,
        position=POSITIONS[position],
        rope_theta=float(get("rotary_base", 10000)),
        rope_fraction=float(get("rotary_percent", 1.0)),
        rope_interleaved=bool(get("rotary_interleaved", False)),
        linear_bias=bias,
        qkv_bias=bias or bool(get("add_qkv_bias", False)),
        attention_out_bias=bias,
        qk_norm=bool(get("qk_layernorm", False)),
        tie_embeddings=not get("untie_embeddings_and_output_weights", False),
        init_std=float(get("init_method_std", 0.02)),
    )
    if get("num_experts"):
        model.moe = read_mixture(get, args.num_layers, int(model.ffn_hidden_size or 0))
    if get("use_rope_scaling", False):
        model.rope_scaling = dataclasses.replace(ROPE_SCALING, factor=float(get("rope_scaling_factor", 8.0)))
    if model.vocab_size > args.padded_vocab_size:
        raise ConfigError(
            f"vocabulary size {model.vocab_size} is more than the checkpoint's {args.padded_vocab_size} rows"
        )
    model.fill_in()
    return model


def write_args(model: ModelConfig, *, tensor: int, pipeline: int, virtual: int, padded_vocab_size: int) -> Namespace:
    """Write the arguments that `--use-checkpoint-args` reads. ConfigError where Megatron cannot express the model."""
    args = Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        group_query_attention=model.num_kv_heads != model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        seq_length=model.seq_length,
        max_position_embeddings=model.position_limit,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size,
        make_vocab_size_divisible_by=128,
        position_embedding_type=POSITION_NAMES.get(model.position, model.position),
        add_position_embedding=model.position == "learned",
        use_rotary_position_embeddings=model.position == "rope",
        rotary_base=int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta,
        rotary_percent=model.rope_fraction,
        rotary_interleaved=model.rope_interleaved,
        use_rope_scaling=model.rope_scaling.kind == "llama3",
        rope_scaling_factor=model.rope_scaling.factor,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        norm_epsilon=model.norm_eps,
        layernorm_epsilon=model.norm_eps,
        apply_layernorm_1p=False,
        qk_layernorm=model.qk_norm,
        swiglu=model.activation == "swiglu",
        openai_gelu=model.activation == "gelu_tanh" and not model.linear_bias,
        bias_gelu_fusion=model.activation == "gelu_tanh",
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        init_method_std=model.init_std,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        **(vars(write_mixture(model)) if model.moe.num_experts else {"num_experts": None}),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    ours, theirs = ({**collect_function(m), "rope_interleaved": m.rope_interleaved} for m in (model, read_args(args)))
    lost = [f"model.{key}={value!r}" for key, value in ours.items() if value != theirs.get(key)]
    if lost:
        raise ConfigError(
            f"Megatron-LM cannot express {', '.join(lost)}; change these settings, or convert to another format"
        )
    return args
