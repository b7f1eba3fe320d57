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
        centre = 1.0 if "norm" in key.lower() or "ln_" in key else 0.0
        if key.endswith("bias"):
            centre = 0.0
        torch.nn.init.normal_(parameter, centre, spread)
    return model.eval()


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
