"""Rotated families with LayerNorm: GPT-NeoX, StarCoder2, Nemotron, Cohere."""

from __future__ import annotations

from megalm.config import ModelConfig
from megalm.convert.families.family import (
    GATED,
    UNGATED,
    Config,
    Family,
    Json,
    Names,
    activation,
    chain,
    join,
    same,
    truth,
)
from megalm.convert.families.llama import (
    ATTENTION,
    BEFORE,
    BIASES,
    ENDS,
    MLP,
    MLP_BIAS,
    PREFIX,
    shape_settings,
    without,
)
from megalm.convert.families.rope import make_rope_reader, write_partial_rope, write_rope, write_scaling
from megalm.convert.families.windows import make_pattern_reader, read_window, write_pattern, write_window


def _write_neox_rope(model: ModelConfig) -> Json:
    return {
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": model.rope_fraction,
        "rope_scaling": write_scaling(model),
    }


def _read_qk_norm(json: Config, model: ModelConfig) -> None:
    model.qk_norm = bool(json.get("use_qk_norm", False))
    model.qk_norm_scope = "each" if model.qk_norm else "head"


def _leave_rope_out_of_full_layers(json: Config, model: ModelConfig) -> None:
    """Only layers with a window are rotated."""
    words = model.layer_pattern or ["full" if model.window is None else "window"]
    model.layer_pattern = ["window" if word == "window" else "full_no_rope" for word in words]
    if set(model.layer_pattern) == {"window"}:
        model.layer_pattern = []
    for key in ("use_gated_activation", "use_parallel_block", "use_embedding_sharing", "use_parallel_embedding"):
        json.get(key)  # what the class always does, said by Command R7B
    json.get("layer_switch"), json.get("order_of_interleaved_layers")  # what layer_types says
    json.get("rotary_pct")


NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    (
        *(s for s in shape_settings() if s.key not in ("num_key_value_heads", "head_dim")),
        same("layer_norm_eps", "norm_eps", 1e-5),
        activation("hidden_act", "gelu", UNGATED),
        truth("use_parallel_residual", True, "parallel_residual"),
        truth("attention_bias", True, "qkv_bias", "attention_out_bias"),
    ),
    Names(
        {"gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "final_norm", "embed_out": "output"},
        "gpt_neox.layers.{}",
        {
            **BEFORE,
            "attention.query_key_value": ("attention.query", "attention.key", "attention.value"),
            "attention.dense": "attention.output",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        },
        grouped=True,
        aliases={"embed_out.weight": "lm_head.weight"},
    ),
    {"norm": "layernorm", "norm_bias": True, "linear_bias": True},
    make_rope_reader(fraction=0.25),
    _write_neox_rope,
)
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
        *without("head_dim", shape_settings(kv_heads=2, positions=4096, tied=True)),
        same("norm_epsilon", "norm_eps", 1e-5),
        activation("hidden_act", "gelu_pytorch_tanh", UNGATED, gelu_tanh="gelu_pytorch_tanh"),
        truth("use_bias", True, "qkv_bias", "attention_out_bias", "linear_bias"),
    ),
    Names(ENDS, PREFIX, {**BEFORE, **ATTENTION, "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}),
    {"norm": "layernorm", "norm_bias": True},
    chain(make_rope_reader(), read_window(None)),
    join(write_rope, write_window),
)
NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    (
        *shape_settings(positions=4096),
        same("norm_eps", "norm_eps", 1e-5),
        activation("hidden_act", "relu2", UNGATED),
        BIASES,
        MLP_BIAS,
    ),
    Names(ENDS, PREFIX, {**BEFORE, **ATTENTION, "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}),
    {"norm": "layernorm", "norm_bias": True, "norm_unit_offset": True},
    make_rope_reader(fraction=0.5),
    write_partial_rope,
)
_COHERE = (
    *without("head_dim", shape_settings(positions=8192, tied=True)),
    same("layer_norm_eps", "norm_eps", 1e-5),
    activation("hidden_act", "silu", GATED),
    BIASES,
    same("logit_scale", "logit_scale", 0.0625),
)
_COHERE_NAMES = Names(ENDS, PREFIX, {"input_layernorm": "attention_norm", **ATTENTION, **MLP})
_COHERE_ALWAYS = {"norm": "layernorm", "parallel_residual": True, "shared_norm": True}
COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    _COHERE,
    _COHERE_NAMES,
    _COHERE_ALWAYS,
    chain(make_rope_reader(theta=500000.0), _read_qk_norm),
    join(write_rope, lambda model: {"use_qk_norm": model.qk_norm and model.qk_norm_scope == "each"}),
    interleaved=True,
)
COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    _COHERE,
    _COHERE_NAMES,
    _COHERE_ALWAYS,
    chain(make_rope_reader(), make_pattern_reader(4), _leave_rope_out_of_full_layers),
    join(write_rope, write_pattern),
    interleaved=True,
)
FAMILIES = (NEOX, STARCODER2, NEMOTRON, COHERE, COHERE2)
