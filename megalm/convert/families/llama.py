"""Llama and its close relatives: the same names, and settings that differ in a few."""

from __future__ import annotations

from typing import Any

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.families.family import (
    GATED,
    Config,
    Family,
    Json,
    Names,
    Setting,
    activation,
    chain,
    join,
    longest,
    same,
    truth,
)
from megalm.convert.families.rope import make_rope_reader, write_layers_rope, write_rope
from megalm.convert.families.windows import (
    make_pattern_reader,
    name_layer_kinds,
    read_qwen_windows,
    read_window,
    write_pattern,
    write_qwen_windows,
    write_window,
)

ENDS = {"model.embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "output"}
ATTENTION: dict[str, str | tuple[str, ...]] = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "self_attn.o_proj": "attention.output",
}
MLP: dict[str, str | tuple[str, ...]] = {
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
BEFORE: dict[str, str | tuple[str, ...]] = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
BEHIND: dict[str, str | tuple[str, ...]] = {
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "mlp_norm",
}
PREFIX = "model.layers.{}"
NAMES = Names(ENDS, PREFIX, {**BEFORE, **ATTENTION, **MLP})
NORMS_BEHIND = Names(ENDS, PREFIX, {**BEHIND, **ATTENTION, **MLP})

BIASES = truth("attention_bias", False, "qkv_bias", "attention_out_bias")
MLP_BIAS = truth("mlp_bias", False, "linear_bias")
QK_HEAD = {"qk_norm": True, "qk_norm_scope": "head"}
QK_FULL = {"qk_norm": True, "qk_norm_scope": "full"}


def shape_settings(
    *, kv_heads: int | None = None, positions: int = 2048, head_dim: int | None = None, tied: bool = False
) -> tuple[Setting, ...]:
    """Sizes, as nearly all families name them; the defaults are transformers' for the family."""
    return (
        same("num_hidden_layers", "num_layers"),
        same("hidden_size", "hidden_size"),
        same("num_attention_heads", "num_heads"),
        same("num_key_value_heads", "num_kv_heads", kv_heads),
        same("head_dim", "head_dim", head_dim),
        same("intermediate_size", "ffn_hidden_size"),
        same("vocab_size", "vocab_size"),
        longest("max_position_embeddings", positions),
        truth("tie_word_embeddings", tied, "tie_embeddings"),
        same("initializer_range", "init_std", 0.02),
    )


def llama_settings(*, eps: float = 1e-6, **shape: Any) -> tuple[Setting, ...]:
    """Sizes, the usual norm and the usual MLP."""
    return (*shape_settings(**shape), same("rms_norm_eps", "norm_eps", eps), activation("hidden_act", "silu", GATED))


def without(key: str, settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """Leave out a setting that a family's class does not have."""
    return tuple(setting for setting in settings if setting.key != key)


def _note_bias(json: Config, model: ModelConfig) -> None:
    json.get("attention_bias")  # said by some Qwen2; queries, keys and values have biases whatever it says


def _read_no_rope(json: Config, model: ModelConfig) -> None:
    """SmolLM3: 1 for each layer with a rotation; windows stand on layers without."""
    interval = json.get("no_rope_layer_interval", 4)
    rotated = json.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(model.num_layers)]
    if len(rotated) != model.num_layers:
        raise ConfigError(f"config.json: no_rope_layers names {len(rotated)} layers, not {model.num_layers}")
    window = json.get("sliding_window") if json.get("use_sliding_window", False) else None
    kinds = json.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if window and not there else "full_attention" for there in rotated]
    words = name_layer_kinds(model, kinds)
    if "window" in words and window is None:
        raise ConfigError(
            "config.json: layer_types has sliding_attention, and use_sliding_window and sliding_window do not"
        )
    if window is not None and window >= model.seq_length:
        words = ["full"] * len(words)
    model.window = window if "window" in words else None
    words = [word if there else f"{word}_no_rope" for word, there in zip(words, rotated, strict=True)]
    length = next(n for n in range(1, len(words) + 1) if all(w == words[i % n] for i, w in enumerate(words)))
    model.layer_pattern = [] if set(words) == {"full"} else words[:length]


def _write_no_rope(model: ModelConfig) -> Json:
    words = [model.attends(index) for index in range(model.num_layers)]
    windows = {"sliding_window": model.window} if model.window else {}
    return {
        "no_rope_layers": [int(not word.endswith("_no_rope")) for word in words],
        "layer_types": ["sliding_attention" if word.startswith("window") else "full_attention" for word in words],
        "use_sliding_window": model.window is not None,
        **windows,
    }


def _read_multiplier(json: Config, model: ModelConfig) -> None:
    model.attention_scale = float(json.get("attention_multiplier", 1.0))


def _write_multiplier(model: ModelConfig) -> Json:
    return {"attention_multiplier": model.attention_scale or float(model.head_dim or 1) ** -0.5}


def _inverse(value: float) -> float:
    return 1.0 / value


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*llama_settings(), BIASES, MLP_BIAS),
    NAMES,
    read_more=make_rope_reader(),
    write_more=write_rope,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    llama_settings(kv_heads=8, positions=131072),
    NAMES,
    read_more=chain(make_rope_reader(), read_window(4096)),
    write_more=join(write_rope, write_window),
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    llama_settings(kv_heads=32, positions=32768),
    NAMES,
    {"qkv_bias": True},
    chain(make_rope_reader(), read_qwen_windows, _note_bias),
    join(write_rope, write_qwen_windows),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (*llama_settings(kv_heads=32, positions=32768, head_dim=128), BIASES),
    NAMES,
    QK_HEAD,
    chain(make_rope_reader(), read_qwen_windows),
    join(write_rope, write_qwen_windows),
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    (*without("head_dim", llama_settings(eps=1e-5)), BIASES),
    NORMS_BEHIND,
    {"norm_placement": "post", **QK_FULL},
    make_rope_reader(),
    write_rope,
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    OLMO2.settings,
    NORMS_BEHIND,
    OLMO2.always,
    chain(make_rope_reader(theta=500000.0, layers=True), make_pattern_reader(4)),
    join(write_layers_rope, write_pattern),
)
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    (*without("head_dim", llama_settings(kv_heads=4, positions=32768, tied=True)), BIASES, MLP_BIAS),
    NAMES,
    read_more=chain(make_rope_reader(theta=2000000.0), _read_no_rope),
    write_more=join(write_rope, _write_no_rope),
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    (
        *without("head_dim", llama_settings()),
        BIASES,
        MLP_BIAS,
        same("embedding_multiplier", "embedding_scale", 1.0),
        same("residual_multiplier", "residual_scale", 1.0),
        Setting("logits_scaling", ("logit_scale",), 1.0, _inverse, _inverse),
    ),
    NAMES,
    read_more=chain(make_rope_reader(), _read_multiplier),
    write_more=join(write_rope, _write_multiplier),
)
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3, SMOLLM3, GRANITE)
