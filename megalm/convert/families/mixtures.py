"""Mixtures of experts: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GLM-4.5, gpt-oss, DBRX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.families.family import (
    Config,
    Experts,
    Family,
    Json,
    Names,
    Setting,
    chain,
    join,
    refuse,
    same,
    truth,
)
from megalm.convert.families.llama import (
    ATTENTION,
    BEFORE,
    BIASES,
    ENDS,
    MLP,
    PREFIX,
    QK_FULL,
    QK_HEAD,
    llama_settings,
    without,
)
from megalm.convert.families.rope import make_rope_reader, write_partial_rope, write_rope, write_scaling
from megalm.convert.families.windows import (
    make_pattern_reader,
    read_qwen_windows,
    read_window,
    write_pattern,
    write_qwen_windows,
    write_window,
)

EXPERTS = {f"mlp.experts.{{}}.{name}_proj": f"mlp.experts.{{}}.{name}" for name in ("gate", "up", "down")}
ROUTER = {"mlp.gate": "mlp.router"}
SHARED = {f"mlp.shared_experts.{name}_proj": f"mlp.shared_expert.{name}" for name in ("gate", "up", "down")}
SELECTION = {"mlp.gate.e_score_correction_bias": "mlp.router.selection_bias"}
SOFTMAX: Mapping[str, Any] = {"moe.score": "softmax"}
SIGMOID: Mapping[str, Any] = {"moe.score": "sigmoid", "moe.selection_bias": True}


def norm_weights(default: bool) -> Setting:
    """The chosen scores are divided by their sum."""
    fields = ("moe.weight_norm",)
    return Setting(
        "norm_topk_prob", fields, default, lambda on: 1.0 if on else None, lambda norm: norm == 1.0, none=False
    )


def _check_router_noise(json: Config, model: ModelConfig) -> None:
    refuse(json, "router_jitter_noise", 0.0, None)


def _check_clip(json: Config, model: ModelConfig) -> None:
    refuse(json, "clip_qkv", None)  # behind the norms there, in front of them here


def _read_layers(json: Config, model: ModelConfig) -> None:
    """Qwen: every so many-th layer is a mixture, but for some."""
    model.moe.every = json.get("decoder_sparse_step", 1)
    model.moe.dense_layers = sorted(json.get("mlp_only_layers") or [])


def _write_layers(model: ModelConfig) -> Json:
    moe = model.moe
    dense = sorted({*range(moe.first_dense), *moe.dense_layers})
    return {"decoder_sparse_step": moe.every, "mlp_only_layers": dense}


def _read_qwen3_window(json: Config, model: ModelConfig) -> None:
    if json.get("use_sliding_window", False):
        read_window(4096)(json, model)
    json.get("sliding_window"), json.get("max_window_layers")


def _write_qwen3_window(model: ModelConfig) -> Json:
    return {"use_sliding_window": True, **write_window(model)} if model.window else {"use_sliding_window": False}


def _read_qwen2_windows(json: Config, model: ModelConfig) -> None:
    if json.get("use_sliding_window", False) and json.get("layer_types") is None:
        raise ConfigError(
            "config.json: use_sliding_window=true is not supported for qwen2_moe without layer_types, which says what layers "
            "have the window"
        )
    read_qwen_windows(json, model)


def read_groups(json: Config, model: ModelConfig) -> None:
    """Read DeepSeek's groups of experts; one group is none."""
    groups = json.get("n_group", 8 if json["model_type"] == "deepseek_v3" else 1)
    chosen = json.get("topk_group", 4 if json["model_type"] == "deepseek_v3" else 1)
    if groups is not None and groups > 1:
        model.moe.groups, model.moe.top_groups, model.moe.group_scores = groups, chosen, 2


def write_groups(model: ModelConfig) -> Json:
    """Write groups of experts."""
    return {"n_group": model.moe.groups or 1, "topk_group": model.moe.top_groups or 1}


def _read_count(experts: int) -> int:
    if experts < 1:
        raise ConfigError(f"config.json: {experts} experts: a family of mixtures has no model without")
    return experts


def routed(experts: str, width: str, *more: Setting) -> tuple[Setting, ...]:
    """Settings of nearly all mixtures. experts, width: keys of the number of experts and of an expert's hidden features."""
    return (
        Setting(experts, ("moe.num_experts",), read=_read_count, also=("num_local_experts",)),
        same("num_experts_per_tok", "moe.top_k"),
        same(width, "moe.ffn_hidden_size"),
        *more,
    )


PREDICTION = {
    "enorm": "embedding_norm",
    "hnorm": "hidden_norm",
    "eh_proj": "merge",
    "shared_head.norm": "final_norm",
}
"""What layers have that predict further tokens, numbered on behind the last one."""
PREDICTION_COPIES = {"embed_tokens": "embedding", "shared_head.head": "output"}
"""The model's own tables, which such a layer has once more."""
PREDICTED = Setting("num_nextn_predict_layers", ("prediction.depth",), 1, also=("num_mtp_layers",), none=0)
"""How many there are: where the files have none, none (transformers leaves them out of what it saves)."""


def shared_by_number(default: int) -> Setting:
    """DeepSeek's shared experts: so many times an expert's width."""
    return same("n_shared_experts", "moe.num_shared_experts", default)


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *(s for s in llama_settings(kv_heads=8, positions=131072, eps=1e-5) if s.key != "intermediate_size"),
        Setting("intermediate_size", ("ffn_hidden_size", "moe.ffn_hidden_size")),
        same("num_local_experts", "moe.num_experts", 8),
        same("num_experts_per_tok", "moe.top_k", 2),
    ),
    Names(
        ENDS,
        PREFIX,
        {
            **BEFORE,
            **ATTENTION,
            "block_sparse_moe.gate": "mlp.router",
            "block_sparse_moe.experts.{}.w1": "mlp.experts.{}.gate",
            "block_sparse_moe.experts.{}.w3": "mlp.experts.{}.up",
            "block_sparse_moe.experts.{}.w2": "mlp.experts.{}.down",
        },
    ),
    {**SOFTMAX, "moe.weight_norm": 1.0},
    chain(make_rope_reader(theta=1e6), read_window(None), _check_router_noise),
    join(write_rope, write_window),
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    (
        *(s for s in llama_settings(positions=4096, eps=1e-5) if s.key not in ("intermediate_size", "head_dim")),
        Setting("intermediate_size", ("ffn_hidden_size", "moe.ffn_hidden_size")),
        BIASES,
        Setting("num_experts", ("moe.num_experts",), 64, also=("num_local_experts",)),
        same("num_experts_per_tok", "moe.top_k", 8),
        norm_weights(False),
    ),
    Names(ENDS, PREFIX, {**BEFORE, **ATTENTION, **ROUTER, **EXPERTS}),
    {**SOFTMAX, **QK_FULL},
    chain(make_rope_reader(), _check_clip),
    write_rope,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        *without("head_dim", llama_settings(kv_heads=16, positions=32768)),
        *routed("num_experts", "moe_intermediate_size"),
        truth("qkv_bias", True, "qkv_bias"),
        same("shared_expert_intermediate_size", "moe.shared_ffn_hidden_size", 5632),
        norm_weights(False),
    ),
    Names(
        ENDS,
        PREFIX,
        {
            **BEFORE,
            **ATTENTION,
            **MLP,
            **ROUTER,
            **EXPERTS,
            **{f"mlp.shared_expert.{name}_proj": f"mlp.shared_expert.{name}" for name in ("gate", "up", "down")},
            "mlp.shared_expert_gate": "mlp.shared_gate",
        },
    ),
    {**SOFTMAX, "moe.shared_gate": True},
    chain(make_rope_reader(), _read_qwen2_windows, _read_layers),
    join(write_rope, write_qwen_windows, _write_layers),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *llama_settings(kv_heads=4, positions=32768),
        *routed("num_experts", "moe_intermediate_size"),
        BIASES,
        norm_weights(False),
    ),
    Names(ENDS, PREFIX, {**BEFORE, **ATTENTION, **MLP, **ROUTER, **EXPERTS}),
    {**SOFTMAX, **QK_HEAD},
    chain(make_rope_reader(), _read_qwen3_window, _read_layers),
    join(write_rope, _write_qwen3_window, _write_layers),
)
DEEPSEEK_LIKE = (
    *routed("n_routed_experts", "moe_intermediate_size"),
    norm_weights(True),
    same("first_k_dense_replace", "moe.first_dense", 1),
    PREDICTED,
)


def _read_qk_norm(json: Config, model: ModelConfig) -> None:
    model.qk_norm = bool(json.get("use_qk_norm", False))


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    (
        *llama_settings(kv_heads=8, positions=131072, eps=1e-5),
        *DEEPSEEK_LIKE,
        same("routed_scaling_factor", "moe.weight_scale", 1.0),
        shared_by_number(1),
        truth("attention_bias", False, "qkv_bias"),
    ),
    Names(
        ENDS,
        PREFIX,
        {**BEFORE, **ATTENTION, **MLP, **ROUTER, **SELECTION, **EXPERTS, **SHARED},
        prediction=PREDICTION,
        copies=PREDICTION_COPIES,
    ),
    SIGMOID,
    chain(make_rope_reader(fraction=0.5), read_groups, _read_qk_norm),
    join(write_partial_rope, write_groups, lambda model: {"use_qk_norm": model.qk_norm}),
)


def _read_gpt_oss(json: Config, model: ModelConfig) -> None:
    refuse(json, "swiglu_alpha", 1.702)
    refuse(json, "hidden_act", "silu")
    (
        json.get("experts_per_token"),
        json.get("initial_context_length"),
    )  # said beside num_experts_per_tok and the rotation's own


_OSS_BIAS = truth("attention_bias", True, "qkv_bias", "attention_out_bias")
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    (
        *(
            s
            for s in llama_settings(kv_heads=8, positions=131072, head_dim=64, eps=1e-5)
            if s.key not in ("intermediate_size", "hidden_act")
        ),
        Setting("intermediate_size", ("ffn_hidden_size", "moe.ffn_hidden_size")),
        same("num_local_experts", "moe.num_experts", 128),
        same("num_experts_per_tok", "moe.top_k", 4),
        same("swiglu_limit", "activation_limit", 7.0),
        _OSS_BIAS,
    ),
    Names(
        ENDS,
        PREFIX,
        {
            **BEFORE,
            **ATTENTION,
            "self_attn.sinks": "attention.sinks",
            "mlp.router": "mlp.router",
            "mlp.experts.gate_up_proj": Experts(
                ("mlp.experts.{}.gate.weight", "mlp.experts.{}.up.weight"), interleaved=True, transposed=True
            ),
            "mlp.experts.gate_up_proj_bias": Experts(
                ("mlp.experts.{}.gate.bias", "mlp.experts.{}.up.bias"), interleaved=True
            ),
            "mlp.experts.down_proj": Experts(("mlp.experts.{}.down.weight",), transposed=True),
            "mlp.experts.down_proj_bias": Experts(("mlp.experts.{}.down.bias",)),
        },
    ),
    {
        **SOFTMAX,
        "moe.weight_norm": 1.0,
        "moe.router_bias": True,
        "activation": "clamped_swiglu",
        "linear_bias": True,
        "attention_sinks": True,
    },
    chain(make_rope_reader(theta=150000.0), make_pattern_reader(2, 128), _read_gpt_oss),
    join(write_rope, write_pattern, lambda model: {"hidden_act": "silu"}),
)


def _read_dbrx(json: Config, model: ModelConfig) -> None:
    attention, ffn = json.get("attn_config") or Config({}), json.get("ffn_config") or Config({})
    model.num_kv_heads = attention.get("kv_n_heads", 1)
    refuse(json, "num_key_value_heads", None, model.num_kv_heads)
    model.clip_qkv = attention.get("clip_qkv")
    if attention.get("rope_theta") is not None:  # where it stood before transformers 5
        model.rope_theta = float(attention["rope_theta"])
    model.ffn_hidden_size = model.moe.ffn_hidden_size = ffn.get("ffn_hidden_size", 3584)
    model.moe.num_experts = ffn.get("moe_num_experts", 4)
    model.moe.top_k = ffn.get("moe_top_k", 1)
    model.moe.weight_norm = ffn.get("moe_normalize_expert_weights", 1.0)
    if (ffn.get("ffn_act_fn") or {"name": "silu"}).get("name") != "silu":
        raise ConfigError(
            f"config.json: ffn_act_fn={dict(ffn['ffn_act_fn'])} is not supported; allowed: {{'name': 'silu'}}"
        )
    refuse(ffn, "moe_jitter_eps", None, 0, 0.0)
    for key in ("hidden_size", "moe_loss_weight", "uniform_expert_assignment"):
        ffn.get(key)  # the model's own, and of training


def _write_dbrx(model: ModelConfig) -> Json:
    moe = model.moe
    return {
        "attn_config": {"kv_n_heads": model.num_kv_heads, "clip_qkv": model.clip_qkv, "rope_theta": model.rope_theta},
        "ffn_config": {
            "ffn_hidden_size": moe.ffn_hidden_size,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.top_k,
            "moe_normalize_expert_weights": moe.weight_norm,
            "ffn_act_fn": {"name": "silu"},
        },
        "rope_theta": model.rope_theta,
        "rope_scaling": write_scaling(model),
    }


DBRX = Family(
    "dbrx",
    "DbrxForCausalLM",
    (
        same("n_layers", "num_layers"),
        same("d_model", "hidden_size"),
        same("n_heads", "num_heads"),
        same("vocab_size", "vocab_size"),
        same("max_seq_len", "seq_length", 2048),
        truth("tie_word_embeddings", False, "tie_embeddings"),
        same("initializer_range", "init_std", 0.02),
    ),
    Names(
        {"transformer.wte": "embedding", "transformer.norm_f": "final_norm", "lm_head": "output"},
        "transformer.blocks.{}",
        {
            "norm_attn_norm.norm_1": "attention_norm",
            "norm_attn_norm.attn.Wqkv": ("attention.query", "attention.key", "attention.value"),
            "norm_attn_norm.attn.out_proj": "attention.output",
            "norm_attn_norm.norm_2": "mlp_norm",
            "ffn.router.layer": "mlp.router",
            "ffn.experts.mlp.w1": Experts(("mlp.experts.{}.gate.weight",), flat=True),
            "ffn.experts.mlp.v1": Experts(("mlp.experts.{}.up.weight",), flat=True),
            "ffn.experts.mlp.w2": Experts(("mlp.experts.{}.down.weight",), flat=True, transposed=True),
        },
    ),
    {**SOFTMAX, "norm": "layernorm", "norm_eps": 1e-5},
    chain(make_rope_reader(), _read_dbrx),
    _write_dbrx,
)
FAMILIES = (MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, GPT_OSS, DBRX)
