"""Small random models of every supported architecture, built with transformers itself."""

from collections.abc import Callable

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY = 96
LLAMA_LIKE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


def _llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA_LIKE, **changes}))


def _gpt2(**changes):
    base = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**base, **changes}))


def _gpt_neox(**changes):
    base = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**base, **changes}))


def _mpt(**changes):
    base = dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, eos_token_id=2)
    return transformers.MptForCausalLM(transformers.MptConfig(**{**base, **changes}))


YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)
SMALL_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
DEEPSEEK = dict(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=10,
    num_key_value_heads=4,
)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)


def _of(family: str, config: str | None = None, **changes) -> Callable:
    """A model of a family whose settings have Llama's names; eager, because transformers' fused paths cap no scores."""

    def make():
        settings = {**LLAMA_LIKE, **changes, "attn_implementation": "eager"}
        made = getattr(transformers, config or f"{family}Config")(**settings)
        return getattr(transformers, f"{family}ForCausalLM")(made)

    return make


def _dbrx():
    ffn = dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2)
    sizes = dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    attention = dict(clip_qkv=0.5, kv_n_heads=2, rope_theta=10000.0)
    config = transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn, attn_implementation="eager")
    return transformers.DbrxForCausalLM(config)


BUILDERS: dict[str, Callable] = {
    "llama2": _llama,
    "llama3": lambda: _llama(rope_parameters=LLAMA3_ROPE),
    "llama-linear-scaling": lambda: _llama(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "llama-tied-biased": lambda: _llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA_LIKE, sliding_window=None)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA_LIKE, head_dim=16)),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**LLAMA_LIKE)),
    "gpt2": _gpt2,
    "gpt2-relu-narrow": lambda: _gpt2(activation_function="relu", n_inner=40),
    "pythia": _gpt_neox,
    "gpt-neox-sequential": lambda: _gpt_neox(
        use_parallel_residual=False, rope_parameters=dict(rope_theta=2000.0, partial_rotary_factor=1.0)
    ),
    "mistral-window": _of("Mistral", sliding_window=7),
    "qwen2-window": _of("Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1, num_hidden_layers=3),
    "qwen3-window": _of(
        "Qwen3",
        head_dim=16,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_hidden_layers=3,
    ),
    "llama-yarn": _of("Llama", rope_parameters=dict(YARN, truncate=False)),
    "llama-dynamic": _of("Llama", rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
    "olmo3": _of("Olmo3", num_hidden_layers=4, sliding_window=6),
    "olmo3-yarn": _of(
        "Olmo3",
        num_hidden_layers=4,
        sliding_window=6,
        rope_parameters=dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=2000.0)),
    ),
    "smollm3": _of("SmolLM3", num_hidden_layers=4, no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3-window": _of("SmolLM3", num_hidden_layers=4, use_sliding_window=True, sliding_window=6),
    "granite": _of(
        "Granite",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "gemma2": _of("Gemma2", head_dim=16, query_pre_attn_scalar=24, sliding_window=5, **CAPS),
    "gemma3": _of(
        "Gemma3",
        "Gemma3TextConfig",
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        num_hidden_layers=4,
        sliding_window_pattern=3,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
        final_logit_softcapping=3.0,
    ),
    "phi3": _of("Phi3", sliding_window=20),
    "phi3-long": _of(
        "Phi3",
        original_max_position_embeddings=16,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0]
        ),
    ),
    "phi3-partial": _of("Phi3", partial_rotary_factor=0.5, num_attention_heads=2, num_key_value_heads=2),
    "glm4": _of("Glm4", head_dim=16),
    "cohere": _of("Cohere", logit_scale=0.75, use_qk_norm=True),
    "cohere-plain": _of("Cohere", logit_scale=0.5, attention_bias=True),
    "cohere2": _of("Cohere2", num_hidden_layers=4, sliding_window=6, logit_scale=0.5),
    "nemotron": _of("Nemotron", head_dim=16, mlp_bias=True),
    "starcoder2": _of("Starcoder2", sliding_window=9),
    "mixtral": _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _of("Olmoe", num_experts=8, num_experts_per_tok=3),
    "qwen2-moe": _of(
        "Qwen2Moe", num_hidden_layers=3, shared_expert_intermediate_size=40, mlp_only_layers=[1], **SMALL_EXPERTS
    ),
    "qwen3-moe": _of(
        "Qwen3Moe", num_hidden_layers=4, head_dim=16, decoder_sparse_step=2, norm_topk_prob=True, **SMALL_EXPERTS
    ),
    "glm4-moe": _of(
        "Glm4Moe",
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        n_shared_experts=2,
        routed_scaling_factor=1.7,
        n_group=4,
        topk_group=2,
        attention_bias=True,
        use_qk_norm=True,
        head_dim=16,
    ),
    "gpt-oss": _of(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=6, swiglu_limit=1.5
    ),
    "dbrx": _dbrx,
    "deepseek-v3": _of("DeepseekV3", num_hidden_layers=3, n_group=4, topk_group=2, q_lora_rank=24, **DEEPSEEK),
    "deepseek-v3-no-query-rank": _of(
        "DeepseekV3",
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=0.7),
        **DEEPSEEK,
    ),
    "mpt": _mpt,
    "mpt-six-heads": lambda: _mpt(d_model=48, n_heads=6, attn_config=dict(clip_qkv=0.3)),
}
NAMES = list(BUILDERS)


def build(name: str, seed: int = 0):
    """The model `name`, with weights, norms and biases all random, so that no part can be left out unnoticed."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    for key, parameter in model.named_parameters():
        spread = 0.2 if parameter.ndim > 1 else 0.3
        one_more = any(word in type(model).__name__ for word in ("Gemma", "Nemotron"))  # norms that add it themselves
        centre = 1.0 if ("norm" in key.lower() or "ln_" in key) and not one_more else 0.0
        if key.endswith("bias"):
            centre = 0.0
        torch.nn.init.normal_(parameter, centre, spread)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.1)
    return model.eval()


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
