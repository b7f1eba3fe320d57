"""Families without rotations: GPT-2 and MPT."""

from __future__ import annotations

from megalm.config import ModelConfig
from megalm.convert.families.family import UNGATED, Config, Family, Json, Names, activation, refuse, same, truth

_STACKED = ("attention.query", "attention.key", "attention.value")


def _read_gpt2(json: Config, model: ModelConfig) -> None:
    for key, allowed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        refuse(json, key, allowed)


def _write_gpt2(model: ModelConfig) -> Json:
    return {"resid_pdrop": model.dropout, "embd_pdrop": model.dropout, "attn_pdrop": 0.0}


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    (
        same("n_layer", "num_layers"),
        same("n_embd", "hidden_size"),
        same("n_head", "num_heads"),
        same("n_inner", "ffn_hidden_size", None),
        same("vocab_size", "vocab_size"),
        same("n_positions", "seq_length", 1024),
        same("layer_norm_epsilon", "norm_eps", 1e-5),
        activation("activation_function", "gelu_new", UNGATED),
        truth("tie_word_embeddings", True, "tie_embeddings"),
        same("initializer_range", "init_std", 0.02),
    ),
    Names(
        {
            "transformer.wte": "embedding",
            "transformer.wpe": "position_embedding",
            "transformer.ln_f": "final_norm",
            "lm_head": "output",
        },
        "transformer.h.{}",
        {
            "ln_1": "attention_norm",
            "attn.c_attn": _STACKED,
            "attn.c_proj": "attention.output",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        },
        transposed=True,
    ),
    {
        "norm": "layernorm",
        "norm_bias": True,
        "position": "learned",
        "linear_bias": True,
        "qkv_bias": True,
        "attention_out_bias": True,
    },
    _read_gpt2,
    _write_gpt2,
)


def _read_mpt(json: Config, model: ModelConfig) -> None:
    attention = json.get("attn_config") or Config({})
    for key, allowed in (("alibi", True), ("qk_ln", False), ("prefix_lm", False), ("softmax_scale", None)):
        refuse(attention, key, allowed)
    for key, value in (("no_bias", True), ("logit_scale", None), ("expansion_ratio", 4)):
        refuse(json, key, value)
    model.alibi_max_bias = float(attention.get("alibi_bias_max", 8))
    model.clip_qkv = attention.get("clip_qkv")


def _write_mpt(model: ModelConfig) -> Json:
    return {
        "expansion_ratio": 4,
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


MPT = Family(
    "mpt",
    "MptForCausalLM",
    (
        same("n_layers", "num_layers"),
        same("d_model", "hidden_size"),
        same("n_heads", "num_heads"),
        same("vocab_size", "vocab_size"),
        same("max_seq_len", "seq_length", 2048),
        same("layer_norm_epsilon", "norm_eps", 1e-5),
        truth("tie_word_embeddings", True, "tie_embeddings"),
        same("initializer_range", "init_std", 0.02),
    ),
    Names(
        {"transformer.wte": "embedding", "transformer.norm_f": "final_norm", "lm_head": "output"},
        "transformer.blocks.{}",
        {
            "norm_1": "attention_norm",
            "attn.Wqkv": _STACKED,
            "attn.out_proj": "attention.output",
            "norm_2": "mlp_norm",
            "ffn.up_proj": "mlp.up",
            "ffn.down_proj": "mlp.down",
        },
    ),
    {"norm": "layernorm", "activation": "gelu", "position": "alibi"},
    _read_mpt,
    _write_mpt,
)
FAMILIES = (GPT2, MPT)
