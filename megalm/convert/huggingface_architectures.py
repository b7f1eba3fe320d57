"""Hugging Face's architectures: each one's `config.json` read into a ModelConfig, and written from it.

An architecture is two functions. To add one: these, its line in ARCHITECTURES, and its table of tensors
(`huggingface_names.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megalm.config import ModelConfig, RopeScalingConfig
from megalm.config.errors import ConfigError
from megalm.convert.huggingface_settings import Asked

Json = dict[str, Any]
"""What is written; readers are handed `Config`."""


class Config(Asked):
    """A config.json being read: what was asked of it, what the user accepts, and what there is to tell."""

    def __init__(self, values: Json, accept: Collection[str] = ()):
        super().__init__(values)
        self.accept, self.notes = accept, list[str]()

    def accepts(self, key: str) -> bool:
        """True where the user said that this setting may be passed over."""
        return key in self.accept


GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
UNGATED = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
GATED_NAMES = {"swiglu": "silu", "geglu": "gelu"}
UNGATED_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: its class in transformers and its config in both directions."""

    model_type: str
    class_name: str
    read: Callable[[Config], ModelConfig]
    write: Callable[[ModelConfig], Json]


def _require(json: Config, key: str) -> Any:
    if json.get(key) is None:
        raise ConfigError(f"config.json: key '{key}' is missing; a {json.get('model_type')} config must have it")
    return json[key]


def _activation(json: Config, key: str, default: str, names: dict[str, str]) -> str:
    value = json.get(key, default)
    if value not in names:
        raise ConfigError(f"config.json: {key}={value!r} is not supported; supported are {', '.join(names)}")
    return names[value]


def _refuse(json: Config, key: str, *allowed: Any) -> None:
    """Stops at a setting that this model cannot compute."""
    value = json.get(key, allowed[0])
    if value not in allowed:
        raise ConfigError(f"config.json: {key}={value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


def _read_rope(json: Config, model: ModelConfig, *, fraction: float | None = None) -> None:
    """Read rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    fraction: the share of a head that is rotated where the config does not say; None: this architecture rotates whole heads.
    """
    scaling, parameters = json.get("rope_scaling"), json.get("rope_parameters")
    if scaling and parameters and any(parameters.get(key) != scaling[key] for key in scaling):
        raise ConfigError(
            f"config.json: rope_scaling={dict(scaling)} and rope_parameters={dict(parameters)} disagree; leave one of them out"
        )
    settings = parameters or scaling or Config({})

    def look(key: str, *others: str) -> Any:
        values = [settings.get(key), *(json.get(other) for other in (key, *others))]
        return next((value for value in values if value is not None), None)

    def need(key: str) -> float:
        value = settings.get(key)
        if value is None:
            raise ConfigError(f"config.json: rope scaling {kind!r} needs {key!r}, which is missing")
        return float(value)

    model.position = "rope"
    model.rope_theta = float(look("rope_theta", "rotary_emb_base") or 10000.0)
    model.rope_fraction = float(look("partial_rotary_factor", "rotary_pct") or fraction or 1.0)
    if fraction is None and model.rope_fraction != 1.0:
        raise ConfigError(
            f"config.json: partial_rotary_factor={model.rope_fraction} is not supported for {json['model_type']}, which rotates "
            "whole heads"
        )
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return
    if kind == "linear":
        model.rope_scaling = RopeScalingConfig(kind="linear", factor=need("factor"))
        settings.get("original_max_position_embeddings")  # said by some, without effect on this kind
    elif kind == "llama3":
        model.rope_scaling = RopeScalingConfig(
            kind="llama3",
            factor=need("factor"),
            low_frequency_factor=need("low_freq_factor"),
            high_frequency_factor=need("high_freq_factor"),
            original_seq_length=int(settings.get("original_max_position_embeddings") or model.seq_length),
        )
    else:
        raise ConfigError(f"config.json: rope scaling {kind!r} is not supported; supported are default, linear, llama3")


def _write_rope(model: ModelConfig) -> Json:
    """Write the keys that every transformers since 4.43 reads."""
    scaling = model.rope_scaling
    settings: Json | None = None
    if scaling.kind == "linear":
        settings = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.kind == "llama3":
        settings = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_seq_length,
        }
    return {"rope_theta": model.rope_theta, "rope_scaling": settings}


def _read_llama_like(
    json: Config, *, kv_heads: int | None = None, positions: int = 2048, eps: float = 1e-6, head_dim: int | None = None
) -> ModelConfig:
    """Read what Llama, Mistral, Qwen and OLMo 2 have in common; the keyword defaults are transformers' for that type."""
    heads = _require(json, "num_attention_heads")
    model = ModelConfig(
        name=json.get("model_type", "llama"),
        num_layers=_require(json, "num_hidden_layers"),
        hidden_size=_require(json, "hidden_size"),
        num_heads=heads,
        num_kv_heads=json.get("num_key_value_heads", kv_heads) or heads,
        head_dim=json.get("head_dim", head_dim) or json["hidden_size"] // heads,
        ffn_hidden_size=_require(json, "intermediate_size"),
        vocab_size=_require(json, "vocab_size"),
        seq_length=json.get("max_position_embeddings", positions),
        norm="rmsnorm",
        norm_eps=json.get("rms_norm_eps", eps),
        activation=_activation(json, "hidden_act", "silu", GATED),
        tie_embeddings=bool(json.get("tie_word_embeddings", False)),
        init_std=json.get("initializer_range", 0.02),
    )
    _read_rope(json, model)
    model.fill_in()
    return model


def _write_llama_like(model: ModelConfig) -> Json:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": GATED_NAMES.get(model.activation, "silu"),
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        **_write_rope(model),
    }


def _read_llama(json: Config) -> ModelConfig:
    model = _read_llama_like(json)
    model.qkv_bias = model.attention_out_bias = bool(json.get("attention_bias", False))
    model.linear_bias = bool(json.get("mlp_bias", False))
    return model


def _write_llama(model: ModelConfig) -> Json:
    biases = {"attention_bias": model.qkv_bias and model.attention_out_bias, "mlp_bias": model.linear_bias}
    return {**_write_llama_like(model), **biases}


def _read_mistral(json: Config) -> ModelConfig:
    model = _read_llama_like(json, kv_heads=8, positions=131072)
    _keep_within_window(json, model, json.get("sliding_window", 4096))
    return model


def _keep_within_window(json: Config, model: ModelConfig, window: int | None) -> None:
    """Stops at a window that is smaller than the context, unless the model is wanted for sequences up to the window.

    Up to there attention is plain causal attention; beyond it a token does not see the whole text.
    """
    if window is None or window >= model.seq_length:
        return
    if not json.accepts("sliding_window"):
        raise ConfigError(
            f"config.json: sliding_window={window} is smaller than max_position_embeddings={model.seq_length}: beyond {window} "
            "tokens a token does not see the whole text, and there is no such attention here. Sequences of up to "
            f"{window} tokens are computed the same: --accept sliding_window takes the model with seq_length={window}"
        )
    json.notes.append(
        f"config.json: sliding_window={window}: the model is taken with seq_length={window} in place of {model.seq_length}, "
        "because it is the same function only up to there"
    )
    model.seq_length = window


def _write_mistral(model: ModelConfig) -> Json:
    return {**_write_llama_like(model), "sliding_window": None}


def _read_qwen2(json: Config) -> ModelConfig:
    model = _read_llama_like(json, kv_heads=32, positions=32768)
    _read_qwen_windows(json, model)
    json.get("attention_bias")  # said by some; queries, keys and values have biases whatever it says
    model.qkv_bias = True
    return model


def _write_qwen2(model: ModelConfig) -> Json:
    return {**_write_llama_like(model), "use_sliding_window": False}


def _read_qwen3(json: Config) -> ModelConfig:
    model = _read_llama_like(json, kv_heads=32, positions=32768, head_dim=128)
    _read_qwen_windows(json, model)
    model.qkv_bias = model.attention_out_bias = bool(json.get("attention_bias", False))
    model.qk_norm, model.qk_norm_scope = True, "head"
    return model


def _write_qwen3(model: ModelConfig) -> Json:
    return {**_write_qwen2(model), "attention_bias": model.qkv_bias and model.attention_out_bias}


def _read_qwen_windows(json: Config, model: ModelConfig) -> None:
    """Check Qwen's windows, which stand on some layers, if at all. One that holds the whole context is none."""
    kinds = json.get("layer_types") or []
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise ConfigError(f"config.json: layer_types has {strange[0]!r}; full_attention is what is computed here")
    window = json.get("sliding_window", 4096)
    if json.get("use_sliding_window", False) or "sliding_attention" in kinds:
        _keep_within_window(json, model, window)


def _read_olmo2(json: Config) -> ModelConfig:
    model = _read_llama_like(json, eps=1e-5)
    model.qkv_bias = model.attention_out_bias = bool(json.get("attention_bias", False))
    model.norm_placement = "post"
    model.qk_norm, model.qk_norm_scope = True, "full"
    return model


def _write_olmo2(model: ModelConfig) -> Json:
    json = {**_write_llama_like(model), "attention_bias": model.qkv_bias and model.attention_out_bias}
    json.pop("head_dim")  # always hidden_size / num_attention_heads there
    return json


def _read_gpt2(json: Config) -> ModelConfig:
    for key, allowed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _refuse(json, key, allowed)
    model = ModelConfig(
        name="gpt2",
        num_layers=_require(json, "n_layer"),
        hidden_size=_require(json, "n_embd"),
        num_heads=_require(json, "n_head"),
        ffn_hidden_size=json.get("n_inner") or 4 * json["n_embd"],
        vocab_size=_require(json, "vocab_size"),
        seq_length=json.get("n_positions", 1024),
        norm="layernorm",
        norm_bias=True,
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        activation=_activation(json, "activation_function", "gelu_new", UNGATED),
        position="learned",
        linear_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        tie_embeddings=bool(json.get("tie_word_embeddings", True)),
        init_std=json.get("initializer_range", 0.02),
    )
    model.fill_in()
    return model


def _write_gpt2(model: ModelConfig) -> Json:
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.seq_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_hidden_size,
        "activation_function": UNGATED_NAMES.get(model.activation, "gelu"),
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


def _read_gpt_neox(json: Config) -> ModelConfig:
    bias = bool(json.get("attention_bias", True))
    model = ModelConfig(
        name="gpt_neox",
        num_layers=_require(json, "num_hidden_layers"),
        hidden_size=_require(json, "hidden_size"),
        num_heads=_require(json, "num_attention_heads"),
        ffn_hidden_size=_require(json, "intermediate_size"),
        vocab_size=_require(json, "vocab_size"),
        seq_length=json.get("max_position_embeddings", 2048),
        norm="layernorm",
        norm_bias=True,
        norm_eps=json.get("layer_norm_eps", 1e-5),
        activation=_activation(json, "hidden_act", "gelu", UNGATED),
        linear_bias=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        parallel_residual=bool(json.get("use_parallel_residual", True)),
        tie_embeddings=bool(json.get("tie_word_embeddings", False)),
        init_std=json.get("initializer_range", 0.02),
    )
    _read_rope(json, model, fraction=0.25)
    model.fill_in()
    return model


def _write_gpt_neox(model: ModelConfig) -> Json:
    rope = _write_rope(model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": UNGATED_NAMES.get(model.activation, "gelu"),
        "max_position_embeddings": model.seq_length,
        "layer_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "use_parallel_residual": model.parallel_residual,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.qkv_bias and model.attention_out_bias,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": model.rope_fraction,
        "rope_scaling": rope["rope_scaling"],
    }


def _read_mpt(json: Config) -> ModelConfig:
    attention = json.get("attn_config") or Config({})
    for key, allowed in (("alibi", True), ("qk_ln", False), ("prefix_lm", False), ("softmax_scale", None)):
        _refuse(attention, key, allowed)
    for key, value in (("no_bias", True), ("logit_scale", None), ("expansion_ratio", 4)):
        _refuse(json, key, value)
    model = ModelConfig(
        name="mpt",
        num_layers=_require(json, "n_layers"),
        hidden_size=_require(json, "d_model"),
        num_heads=_require(json, "n_heads"),
        ffn_hidden_size=4 * json["d_model"],
        vocab_size=_require(json, "vocab_size"),
        seq_length=json.get("max_seq_len", 2048),
        norm="layernorm",
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        activation="gelu",
        position="alibi",
        alibi_max_bias=float(attention.get("alibi_bias_max", 8)),
        clip_qkv=attention.get("clip_qkv"),
        tie_embeddings=bool(json.get("tie_word_embeddings", True)),
        init_std=json.get("initializer_range", 0.02),
    )
    model.fill_in()
    return model


def _write_mpt(model: ModelConfig) -> Json:
    return {
        "vocab_size": model.vocab_size,
        "d_model": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_heads,
        "expansion_ratio": 4,
        "max_seq_len": model.seq_length,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "no_bias": True,
        "learned_pos_emb": False,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,  # transformers' MPT computes with 8 whatever stands here
            "attn_impl": "torch",
            "clip_qkv": model.clip_qkv,
            "qk_ln": False,
        },
    }


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", _read_llama, _write_llama),
        Architecture("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
        Architecture("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
        Architecture("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
        Architecture("olmo2", "Olmo2ForCausalLM", _read_olmo2, _write_olmo2),
        Architecture("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2),
        Architecture("gpt_neox", "GPTNeoXForCausalLM", _read_gpt_neox, _write_gpt_neox),
        Architecture("mpt", "MptForCausalLM", _read_mpt, _write_mpt),
    )
}
