"""No setting of a config.json is passed over: it is used, harmless, accepted by name, or refused."""

import json

import pytest

from megalm.config.errors import ConfigError
from megalm.convert.huggingface_config import read_config, read_settings
from tests.convert.architectures import NAMES, build
from tools.convert.__main__ import main as convert

CONFIGS = {
    name: json.loads(build(name).config.to_json_string(use_diff=False)) for name in ("llama2", "qwen3", "gpt2", "mpt")
}
CONFIGS |= {name: json.loads(build(name).config.to_json_string()) for name in NAMES if name not in CONFIGS}

CHANGES_THE_FUNCTION = {
    "llama2": [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"residual_multiplier": 0.22},
        {"embedding_multiplier": 12.0},
        {"logits_scaling": 8.0},
        {"attention_multiplier": 0.0078},
        {"scale_emb": 12, "scale_depth": 1.4},
        {"clip_qkv": 8.0},
        {"partial_rotary_factor": 0.5},
        {"rope_interleaved": True},
        {"no_rope_layers": [1, 1, 1, 0]},
        {"num_experts": 8},
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {"use_sliding_window": True},
        {"sliding_window": 16},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"rope_scaling": {"rope_type": "dynamic"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "a_new_number": 2}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"use_qk_norm": True},
        {"is_causal": False},
        {"mup_width_multiplier": 4.0},
        {"a_new_key_of_theirs": 0.5},
        {"another_new_key": False},
    ],
    "qwen2": [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"layer_types": ["full_attention"]},
    ],
    "qwen3": [{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}],
    "mistral": [{"attention_bias": True}, {"head_dim": 8, "num_experts": 4}],
    "olmo2": [{"clip_qkv": 8.0}, {"head_dim": 16}],
    "olmo3": [
        {"layer_types": ["chunked_attention"] * 4},
        {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}},
    ],
    "smollm3": [{"no_rope_layers": [1, 0]}, {"layer_types": ["sliding_attention"] * 4}],
    "granite": [{"shared_intermediate_size": 8}, {"num_local_experts": 4}],
    "gemma2": [{"use_bidirectional_attention": True}, {"sliding_window": None}, {"hidden_activation": "relu"}],
    "gemma3": [{"attn_logit_softcapping": 50.0}, {"num_kv_shared_layers": 2}],
    "phi3": [{"rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0]}}],
    "glm4": [{"n_routed_experts": 4}],
    "cohere": [{"qk_layernorm": True}, {"layer_types": ["full_attention"] * 2}],
    "cohere2": [{"layer_types": ["full_attention"] * 3}],
    "nemotron": [{"hidden_act": "silu"}, {"norm_topk_prob": True}],
    "starcoder2": [{"sliding_window": 9, "norm_type": "rms_norm"}],
    "gpt2": [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"position_embedding_type": "relative_key"},
    ],
    "pythia": [{"rope_scaling": {"type": "dynamic", "factor": 2.0}}],
    "mpt": [
        {"logit_scale": 0.5},
        {"embedding_fraction": 0.5},
        {"norm_type": "rmsnorm"},
        {"attn_config": {"alibi": True, "attn_type": "multiquery_attention"}},
        {"attn_config": {"alibi": True, "kv_n_heads": 2}},
        {"attn_config": {"alibi": True, "attn_uses_sequence_id": True}},
        {"attn_config": {"alibi": True, "rope": True}},
    ],
}
CASES = [(name, change) for name, changes in CHANGES_THE_FUNCTION.items() for change in changes]


@pytest.mark.parametrize("name, change", CASES, ids=lambda value: str(value)[:60])
def test_a_setting_that_changes_the_function_is_refused_by_name(name, change):
    read_config(CONFIGS[name])
    words = "|".join([*change, "rope scaling", "short_factor"])
    with pytest.raises(ConfigError, match=f"config.json: .*({words})"):
        read_config({**CONFIGS[name], **change})


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_itself_writes_is_taken_whole(name):
    """In the short form that save_pretrained writes, and with every default spelt out."""
    config = build(name).config
    for text in (config.to_json_string(use_diff=True), config.to_json_string(use_diff=False)):
        reading = read_settings(json.loads(text))
        assert reading.model == read_config(json.loads(config.to_json_string()))


@pytest.mark.parametrize(
    "extra",
    [
        {
            "rope_interleaved": False,
            "is_llama_config": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        {"pretraining_tp": 2, "_flash_attn_2_enabled": True, "torch_dtype": "bfloat16", "use_bfloat16": False},
        {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 21, "use_mrope": False},
        {"final_logit_softcapping": None, "residual_multiplier": 1.0, "logits_scaling": 1, "num_experts": 0},
        {"layer_types": ["full_attention", "full_attention"]},
        {"temperature": 0.6, "max_length": 4096, "repetition_penalty": 1.05, "id2label": {"0": "LABEL_0"}},
        {"rope_scaling": None, "partial_rotary_factor": 1.0},
    ],
)
def test_settings_of_published_models_that_do_not_matter_are_let_through(extra):
    assert read_config({**CONFIGS["qwen3"], **extra}) == read_config(CONFIGS["qwen3"])


def test_an_unknown_null_is_told_and_an_accepted_setting_too():
    reading = read_settings({**CONFIGS["llama2"], "new_thing": None, "scale": 3, "deep": {"er": 1}}, ["scale", "deep"])
    assert reading.model == read_config(CONFIGS["llama2"])
    assert "new_thing=null is not known here; it is taken to mean off" in reading.notes[0]
    assert "scale=3 is not known here and was accepted" in reading.notes[1]
    assert 'deep={"er": 1} is not known here and was accepted' in reading.notes[2]


@pytest.mark.parametrize("key", ["hidden_size", "final_logit_softcapping", "nothing"])
def test_accepting_what_is_not_refused_or_cannot_be_accepted_is_an_error(key):
    with pytest.raises(ConfigError, match=f"--accept {key}: config.json has no such setting"):
        read_config(CONFIGS["llama2"], [key])
    with pytest.raises(ConfigError, match="final_logit_softcapping=30.0 is not supported"):
        read_config({**CONFIGS["llama2"], "final_logit_softcapping": 30.0}, ["final_logit_softcapping"])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "starcoder2", "phi3"])
def test_a_window_smaller_than_the_context_is_a_window(name):
    config = {**CONFIGS[name], "sliding_window": 16}
    if name.startswith("qwen"):
        config |= {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    model = read_config(config)
    assert (model.window, model.seq_length) == (16, 64)
    assert model.attends(0) == "window" and model.attends(1) == ("full" if name.startswith("qwen") else "window")
    whole = read_config({**config, "sliding_window": 64})
    assert whole.window is None and whole.layer_pattern == []  # it holds the whole context


def test_rotations_of_published_configs():
    """Phi-3's first name for its stretching, Gemma 3's and Cohere 2's way of saying where windows are."""
    phi = read_config({**CONFIGS["phi3-long"], "rope_parameters": None, "rope_scaling": {
        "type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}})  # fmt: skip
    assert phi.rope_scaling.kind == "longrope" and phi.rope_scaling.attention_factor == pytest.approx(1.5**0.5)
    gemma = {key: value for key, value in CONFIGS["gemma3"].items() if key not in ("layer_types", "rope_parameters")}
    gemma |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    assert read_config(gemma) == read_config(CONFIGS["gemma3"])
    cohere = {key: value for key, value in CONFIGS["cohere2"].items() if key != "layer_types"}
    assert read_config({**cohere, "sliding_window_pattern": 4}) == read_config(CONFIGS["cohere2"])
    smol = {key: value for key, value in CONFIGS["smollm3"].items() if key not in ("no_rope_layers", "layer_types")}
    assert read_config(smol) == read_config(CONFIGS["smollm3"])


def test_an_import_prints_what_it_accepted(tmp_path, capsys):
    build("mistral").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 32, "their_new_key": "x"}))
    capsys.readouterr()
    words = [str(tmp_path / "model"), str(tmp_path / "run"), "--to", "megalm"]
    assert convert(words) == 2
    assert 'their_new_key="x". Where you know' in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert convert([*words, "--verify", "--accept", "their_new_key"]) == 0
    said = capsys.readouterr().out
    assert 'note: config.json: their_new_key="x" is not known here and was accepted' in said
    assert convert([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["sliding_window"] == 32 and exported["their_new_key"] == "x"
