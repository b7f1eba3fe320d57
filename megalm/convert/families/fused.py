"""Families whose gate and up projections are one matrix: Phi-3 and GLM-4."""

from __future__ import annotations

from megalm.config import ModelConfig
from megalm.convert.families.family import Family, Json, Names, chain, join, truth
from megalm.convert.families.llama import ATTENTION, BEFORE, ENDS, PREFIX, llama_settings, without
from megalm.convert.families.rope import make_rope_reader, write_partial_rope
from megalm.convert.families.windows import read_window, write_window

_MLP: dict[str, str | tuple[str, ...]] = {"mlp.gate_up_proj": ("mlp.gate", "mlp.up"), "mlp.down_proj": "mlp.down"}


def _write_original(model: ModelConfig) -> Json:
    long = model.rope_scaling.kind == "longrope"
    return {"original_max_position_embeddings": model.rope_scaling.original_seq_length if long else model.seq_length}


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    without("head_dim", llama_settings(positions=4096, eps=1e-5)),
    Names(
        ENDS,
        PREFIX,
        {
            **BEFORE,
            "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
            "self_attn.o_proj": "attention.output",
            **_MLP,
        },
    ),
    read_more=chain(
        make_rope_reader(fraction=1.0),
        read_window(None),
        lambda json, model: json.get("original_max_position_embeddings"),
    ),
    write_more=join(write_partial_rope, write_window, _write_original),
)
GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    (
        *llama_settings(kv_heads=2, positions=131072, head_dim=128, eps=1.5625e-07),
        truth("attention_bias", True, "qkv_bias"),
    ),
    Names(
        ENDS,
        PREFIX,
        {
            "input_layernorm": "attention_norm",
            "post_self_attn_layernorm": "attention_output_norm",
            "post_attention_layernorm": "mlp_norm",
            "post_mlp_layernorm": "mlp_output_norm",
            **ATTENTION,
            **_MLP,
        },
    ),
    {"norm_placement": "both"},
    make_rope_reader(fraction=0.5),
    write_partial_rope,
    interleaved=True,
)
FAMILIES = (PHI3, GLM4)
