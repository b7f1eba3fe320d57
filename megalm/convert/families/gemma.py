"""Gemma 2 and 3: norms on both sides that multiply by 1 + weight, windows between full layers, capped scores."""

from __future__ import annotations

from megalm.config import ModelConfig
from megalm.convert.families.family import Config, Family, Json, Names, activation, chain, join, longest, refuse, same
from megalm.convert.families.llama import ATTENTION, BIASES, ENDS, MLP, PREFIX, QK_HEAD, shape_settings
from megalm.convert.families.rope import make_rope_reader, write_layers_rope, write_rope
from megalm.convert.families.windows import make_pattern_reader, write_pattern

_NAMES = Names(
    ENDS,
    PREFIX,
    {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_output_norm",
        **ATTENTION,
        **MLP,
    },
)
_ALWAYS = {"norm_unit_offset": True, "norm_placement": "both"}
_WORDS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "silu": "swiglu", "gelu": "geglu"}


def _read_scales(json: Config, model: ModelConfig) -> None:
    model.embedding_scale = model.hidden_size**0.5
    model.attention_scale = float(json.get("query_pre_attn_scalar", 256)) ** -0.5
    json.get("hidden_act")  # beside hidden_activation, which is the one that counts
    refuse(json, "use_bidirectional_attention", None, False)
    json.get("cache_implementation")  # how transformers keeps keys and values


def _write_scales(model: ModelConfig) -> Json:
    scalar = float(model.head_dim or 0) if model.attention_scale is None else round(model.attention_scale**-2, 9)
    return {"query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar}


def _read_no_cap(json: Config, model: ModelConfig) -> None:
    refuse(json, "attn_logit_softcapping", None)


_SETTINGS = (
    *shape_settings(kv_heads=4, positions=8192, head_dim=256, tied=True),
    same("rms_norm_eps", "norm_eps", 1e-6),
    activation("hidden_activation", "gelu_pytorch_tanh", _WORDS),
    BIASES,
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    (
        *_SETTINGS,
        same("attn_logit_softcapping", "attention_softcap", 50.0),
        same("final_logit_softcapping", "logit_softcap", 30.0),
    ),
    _NAMES,
    _ALWAYS,
    chain(make_rope_reader(), make_pattern_reader(2), _read_scales),
    join(write_rope, write_pattern, _write_scales),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    (
        *(longest("max_position_embeddings", 131072) if s.key == "max_position_embeddings" else s for s in _SETTINGS),
        same("final_logit_softcapping", "logit_softcap", None),
    ),
    _NAMES,
    {**_ALWAYS, **QK_HEAD},
    chain(
        make_rope_reader(theta=1e6, layers=True, local_theta=1e4), make_pattern_reader(6), _read_scales, _read_no_cap
    ),
    join(write_layers_rope, write_pattern, _write_scales),
)
FAMILIES = (GEMMA2, GEMMA3)
