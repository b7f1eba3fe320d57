"""DeepSeek-V3 and what has its class (Kimi K2, Moonlight): latent attention, a selection bias, shared experts."""

from __future__ import annotations

import math

from megalm.config import ModelConfig
from megalm.convert.families.family import Config, Family, Json, Names, Setting, chain, join, refuse, same
from megalm.convert.families.llama import BEFORE, ENDS, MLP, PREFIX, llama_settings
from megalm.convert.families.mixtures import (
    DEEPSEEK_LIKE,
    EXPERTS,
    PREDICTION,
    PREDICTION_COPIES,
    ROUTER,
    SELECTION,
    SHARED,
    SIGMOID,
    read_groups,
    shared_by_number,
    write_groups,
)
from megalm.convert.families.rope import compute_yarn_magnitude, make_rope_reader, write_rope

_ATTENTION = {
    "self_attn.q_proj": "attention.query",
    "self_attn.q_a_proj": "attention.query_down",
    "self_attn.q_a_layernorm": "attention.query_down_norm",
    "self_attn.q_b_proj": "attention.query_up",
    "self_attn.kv_a_proj_with_mqa": "attention.key_value_down",
    "self_attn.kv_a_layernorm": "attention.key_value_norm",
    "self_attn.kv_b_proj": "attention.key_value_up",
    "self_attn.o_proj": "attention.output",
}


def _read(json: Config, model: ModelConfig) -> None:
    latent = model.latent
    refuse(json, "num_key_value_heads", None, model.num_heads)
    refuse(json, "rope_interleave", True)
    refuse(json, "attention_bias", False)
    refuse(json, "topk_method", None, "noaux_tc")
    refuse(json, "scoring_func", None, "sigmoid")
    refuse(json, "moe_layer_freq", None, 1)
    refuse(json, "head_dim", None, latent.rope_dim, latent.plain_dim + latent.rope_dim)
    refuse(json, "qk_head_dim", None, latent.plain_dim + latent.rope_dim)
    refuse(json, "rms_norm_eps", 1e-6)  # transformers norms the latents with this whatever stands here
    for key in ("ep_size", "seq_aux", "aux_loss_alpha"):
        json.get(key)  # of training
    rope = json.get("rope_parameters") or json.get("rope_scaling") or Config({})
    share = rope.get("mscale_all_dim")
    if model.rope_scaling.kind == "yarn" and share:
        model.attention_scale = _scale(model) * compute_yarn_magnitude(model.rope_scaling.factor, share) ** 2


def _scale(model: ModelConfig) -> float:
    return float(model.latent.plain_dim + model.latent.rope_dim) ** -0.5


def _write(model: ModelConfig) -> Json:
    written = {
        "num_key_value_heads": model.num_heads,
        "rope_interleave": True,
        "attention_bias": False,
        **write_rope(model),
    }
    scaling = written["rope_scaling"]
    if scaling and model.attention_scale is not None and model.rope_scaling.factor > 1:
        more = math.sqrt(model.attention_scale / _scale(model)) - 1
        scaling["mscale_all_dim"] = round(more / (0.1 * math.log(model.rope_scaling.factor)), 9)
    return written


_SHAPE = ("num_key_value_heads", "head_dim")
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    (
        *(s for s in llama_settings(positions=4096) if s.key not in _SHAPE),
        *(
            Setting("first_k_dense_replace", s.fields, 3) if s.key == "first_k_dense_replace" else s
            for s in DEEPSEEK_LIKE
        ),
        same("routed_scaling_factor", "moe.weight_scale", 2.5),
        shared_by_number(1),
        same("q_lora_rank", "latent.query_rank", 1536),
        same("kv_lora_rank", "latent.key_rank", 512),
        same("qk_nope_head_dim", "latent.plain_dim", 128),
        same("qk_rope_head_dim", "latent.rope_dim", 64),
        same("v_head_dim", "latent.value_dim", 128),
    ),
    Names(
        ENDS,
        PREFIX,
        {**BEFORE, **_ATTENTION, **MLP, **ROUTER, **SELECTION, **EXPERTS, **SHARED},
        prediction=PREDICTION,
        copies=PREDICTION_COPIES,
    ),
    SIGMOID,
    chain(make_rope_reader(), read_groups, _read),
    join(_write, write_groups),
    interleaved=True,
)
FAMILIES = (DEEPSEEK_V3,)
