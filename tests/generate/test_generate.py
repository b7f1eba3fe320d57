"""Sampling and the key/value cache, against the plain forward pass."""

import pytest
import torch

from megalm.config import ModelConfig, ParallelConfig, RopeScalingConfig
from megalm.config.errors import ConfigError
from megalm.config.model import LatentConfig, MoEConfig
from megalm.generate.batch import compute_next_logits
from megalm.generate.generate import generate
from megalm.generate.sampling import sample
from megalm.model.cache import keep_cache
from megalm.model.transformer import Transformer
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_ranks

SMALL = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=50, seq_length=16, ffn_hidden_size=48)
MODELS = {
    "llama": dict(num_kv_heads=2, rope_scaling=RopeScalingConfig(kind="linear", factor=2.0)),
    "gpt2": dict(
        norm="layernorm", norm_bias=True, activation="gelu_tanh", position="learned", linear_bias=True, qkv_bias=True
    ),
    "mpt": dict(norm="layernorm", activation="gelu", position="alibi", tie_embeddings=True, clip_qkv=2.0),
    "neox": dict(norm="layernorm", activation="gelu", rope_fraction=0.5, parallel_residual=True, rope_interleaved=True),
    "olmo2": dict(norm_placement="post", qk_norm=True, qk_norm_scope="full", num_kv_heads=1),
    "none": dict(position="none", qk_norm=True),
    "window": dict(window=4, layer_pattern=["window", "full_no_rope"], num_kv_heads=2, attention_sinks=True),
    "one-token-window": dict(window=1, layer_pattern=["window", "full"]),
    "capped": dict(window=6, attention_softcap=1.0, logit_softcap=2.0, norm_placement="both"),
    "latent": dict(latent=LatentConfig(key_rank=12, query_rank=10, plain_dim=8, rope_dim=4, value_dim=6)),
    "latent-window": dict(latent=LatentConfig(key_rank=12, plain_dim=4, rope_dim=4, value_dim=10), window=5),
    "alibi-window": dict(window=5, position="alibi", norm="layernorm"),
    "mixture": dict(moe=MoEConfig(num_experts=4, num_shared_experts=1, first_dense=1), num_kv_heads=2),
    "gpt-oss": dict(
        moe=MoEConfig(num_experts=4, top_k=3, score="softmax", router_bias=True),
        activation="clamped_swiglu",
        linear_bias=True,
        attention_sinks=True,
        window=4,
        layer_pattern=["window", "full"],
    ),
    "stretched": dict(rope_scaling=RopeScalingConfig(kind="yarn", factor=4.0, original_seq_length=4, beta_fast=2.0)),
}


def make(name: str) -> Transformer:
    config = ModelConfig(**{**SMALL, **MODELS[name]})
    config.fill_in()
    torch.manual_seed(0)
    model = Transformer(config, LayerContext(Mesh.single("cpu"), device="cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.7, 0.4)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_whole_text(name):
    """One token, then several, then one: each time what a forward pass over everything gives at the last position."""
    model = make(name)
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), keep_cache(model, 16):
        cuts = [0, 5, 6, 9, 10, 11, 16]
        with_cache = [compute_next_logits(model, tokens[:, a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)]
    with torch.no_grad():
        plain = [compute_next_logits(model, tokens[:, :b], 0) for b in cuts[1:]]
    for ours, expected in zip(with_cache, plain, strict=True):
        assert ours.shape == (2, 50)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert all(layer.attention.cache is None for layer in model.layers)


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_greedy_text_is_the_argmax_chain(name):
    model = make(name)
    prompt = [3, 1, 4]
    text = list(prompt)
    for _ in range(10):
        with torch.no_grad():
            text.append(int(compute_next_logits(model, torch.tensor([text]), 0)[0].argmax()))
    assert generate(model, prompt, max_tokens=10, temperature=0) == text[3:]


def test_a_window_bounds_the_cache():
    """Layers with a window keep as many keys as the next token sees, however long the text is."""
    model = make("window")
    tokens = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), keep_cache(model, 16):
        for position in range(16):
            compute_next_logits(model, tokens[:, position : position + 1], position)
        kept = [layer.attention.cache._keys.shape[0] for layer in model.layers]
    assert kept == [3, 16]


def test_a_full_window_forgets_its_older_half():
    model = make("gpt2")  # learned positions: there is no position 16
    text, generator = [7], torch.Generator().manual_seed(3)
    while len(text) < 40:
        context = text if len(text) <= 16 else text[len(text) - 8 - (len(text) - 17) % 9 :]
        with torch.no_grad():
            logits = compute_next_logits(model, torch.tensor([context]), 0)[0]
        text.append(sample(logits, 5.0, 0, 1.0, generator))
    assert len(set(text)) > 8  # not stuck, where any context would do
    assert generate(model, [7], max_tokens=39, temperature=5.0, seed=3) == text[1:]
    assert len(generate(model, list(range(30)), max_tokens=3)) == 3  # a prompt longer than the window


def test_seeds_and_stops():
    model = make("llama")
    first = generate(model, [1], max_tokens=12, temperature=1.5, seed=5)
    assert first == generate(model, torch.tensor([1]), max_tokens=12, temperature=1.5, seed=5)
    assert first != generate(model, [1], max_tokens=12, temperature=1.5, seed=6)
    seen: list[int] = []
    until = generate(model, [1], max_tokens=12, temperature=1.5, seed=5, stop={first[4]}, on_token=seen.append)
    assert until == first[: first.index(first[4])] == seen
    assert generate(model, [1], max_tokens=0) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [])


def test_training_mode_and_gradients_survive():
    model = make("mpt").train()
    generate(model, [1, 2], max_tokens=4)
    assert model.training
    hidden = model.head.logits(torch.randn(4, 1, 32))
    hidden.sum().backward()
    assert model.embedding.weight.grad is not None


def test_sampling_keeps_to_the_likeliest():
    logits = torch.tensor([2.0, 0.0, 1.0, 3.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**limits):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **limits}
        return {sample(logits, generator=generator, **settings) for _ in range(400)}

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(temperature=0) == drawn(top_k=1) == drawn(top_p=0.0) == drawn(temperature=0.01) == {3}
    assert drawn(top_k=2) == {3, 0}
    shares = logits.softmax(0)  # 3: .636, 0: .234, 2: .086
    assert drawn(top_p=float(shares[3]) + 0.01) == {3, 0}
    assert drawn(top_p=float(shares[3] + shares[0]) + 0.01) == {3, 0, 2}


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, 2.0, 0, 1.0, generator) for _ in range(4000)])
    observed = torch.bincount(draws, minlength=3) / 4000
    torch.testing.assert_close(observed, (logits / 2).softmax(0), rtol=0, atol=0.03)  # 3 sigma is 0.024


def _write_on_ranks(never: list[int]) -> list[int]:
    config = ModelConfig(**{**SMALL, **MODELS["llama"]})
    config.fill_in()
    parallel = ParallelConfig(tensor=2)
    model = Transformer(config, LayerContext(build_mesh(parallel, "cpu"), parallel, device="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return generate(model, [1], max_tokens=40, temperature=9.0, never=never)


def test_forbidden_tokens_are_not_written_on_one_rank_nor_on_two():
    never = [0, 7, *range(20, 50), 50, 900]  # beyond the vocabulary there is nothing to forbid
    alone = generate(make("llama"), [1], max_tokens=60, temperature=9.0, never=never)
    first, second = run_ranks(2, _write_on_ranks, never)
    assert first == second
    for written in (alone, first):
        assert len(set(written)) > 5 and not set(written) & set(never)
    assert set(generate(make("llama"), [1], max_tokens=60, temperature=9.0)) & set(never)
    with pytest.raises(ConfigError, match="largest logit is -inf"):
        generate(make("llama"), [1], never=range(50))


@pytest.mark.parametrize(
    "settings", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.01}]
)
def test_settings_that_nothing_can_be_drawn_with_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings)).replace("_", "-")):
        generate(make("llama"), [1], max_tokens=2, **settings)
