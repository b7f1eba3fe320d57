"""Parameter counts: by hand, by the published figures, and tensor by tensor against the engine's own."""

import pytest

from megalm.architecture.tensors import count_parameters
from megalm.config.compose import compose_config
from megalm.parallel.layer_context import LayerContext
from megalm.plan.machine import make_planned_machine
from megalm.plan.models import find_largest_fitting, list_models, read_model, scale_model, tabulate_models
from megalm.plan.request import compose, parse

PUBLISHED = {
    "gpt2-124m": (124_439_808, "Radford et al. 2019, as counted by Hugging Face's gpt2"),
    "llama3-8b": (8_030_261_248, "Meta-Llama-3-8B's model card and index"),
    "llama3-70b": (70_553_706_496, "Meta-Llama-3-70B's index"),
    "7b": (6_649_024_512, "MPT-7B: 6.65B"),
    "mistral-7b": (7_241_732_096, "Mistral-7B-v0.1's index"),
    "qwen2.5-7b": (7_615_616_512, "Qwen2.5-7B's index"),
    "qwen3-8b": (8_190_735_360, "Qwen3-8B's index"),
    "qwen3-0.6b": (596_049_920, "Qwen3-0.6B's tensors, its tied output counted once"),
    "smollm2-135m": (134_515_008, "SmolLM2-135M's tensors"),
    "pythia-1.4b": (1_414_647_808, "Biderman et al. 2023, table of model sizes"),
    "olmo2-7b": (7_298_617_344, "OLMo-2-1124-7B's index"),
    "mixtral-8x7b": (46_702_792_704, "Mixtral-8x7B-v0.1's index"),
    "olmoe-1b-7b": (6_919_161_856, "OLMoE-1B-7B-0924's tensors"),
    "qwen3-30b-a3b": (30_532_122_624, "Qwen3-30B-A3B's index"),
    "qwen3-235b-a22b": (235_093_634_560, "Qwen3-235B-A22B's index"),
    "dbrx": (131_596_523_520, "dbrx-base's index"),
    "gpt-oss-20b": (20_914_757_184, "gpt-oss-20b's model card: 20.9B; transformers' GptOssForCausalLM"),
    "glm-4.5-air": (106_852_245_504, "transformers' Glm4MoeForCausalLM of its config.json"),
}


PUBLISHED_ACTIVE = {
    "mixtral-8x7b": 12.9e9,
    "olmoe-1b-7b": 1.3e9,
    "qwen3-30b-a3b": 3.3e9,
    "qwen3-235b-a22b": 22e9,
    "dbrx": 36e9,
}
"""As the models' reports say it, in two digits."""


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE)
def test_published_active_counts(name):
    assert count_parameters(read_model(name)).active == pytest.approx(PUBLISHED_ACTIVE[name], rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    assert count_parameters(read_model(name)).total == PUBLISHED[name][0], PUBLISHED[name][1]


def test_mixture_of_experts_counts_all_and_active():
    """Mixtral 8x7B (Jiang et al. 2024): 46.7B in all, 12.9B active."""
    words = [
        "model.num_layers=32",
        "model.hidden_size=4096",
        "model.num_heads=32",
        "model.num_kv_heads=8",
        "model.ffn_hidden_size=14336",
        "model.vocab_size=32000",
        "model.seq_length=4096",
        "model.moe.num_experts=8",
        "model.moe.top_k=2",
    ]
    model = compose(parse("shape", words, [])).model
    counts = count_parameters(model)
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248


def test_shared_experts_are_always_active():
    words = ["+model=tiny", "model.moe.num_experts=4", "model.moe.top_k=1", "model.moe.num_shared_experts=1"]
    model = compose(parse("shape", words, [])).model
    counts = count_parameters(model)
    expert = 3 * model.hidden_size * model.ffn_hidden_size
    assert counts.total - counts.active == model.num_layers * 3 * expert


@pytest.mark.parametrize(
    "words",
    [
        *([f"+model={name}", "model.num_layers=4"] for name in list_models()),
        ["+model=tiny", "model.parallel_residual=true", "model.linear_bias=true", "model.norm_bias=true"],
        ["+model=tiny", "model.tie_embeddings=false", "model.qk_norm=true"],
        ["+model=tiny", "model.qk_norm=true", "model.qk_norm_scope=full", "model.norm_placement=post"],
        ["+model=gpt2-124m", "model.num_layers=2"],
        ["+model=tiny-moe", "model.prediction.depth=2"],
        ["+model=125m", "model.num_layers=2", "model.embedding_norm=true", "model.norm_bias=true"],
        [
            "+model=llama3-8b",
            "model.num_layers=1",
            "model.hidden_size=512",
            "model.num_heads=4",
            "model.num_kv_heads=1",
        ],
    ],
)
def test_every_tensor_is_the_engines(words):
    torch = pytest.importorskip("torch")
    from megalm.model.transformer import Transformer
    from megalm.parallel.mesh import Mesh
    from megalm.parallel.slices import slice_of

    config = compose_config(words)
    mesh = Mesh.single(torch.device("cpu"))
    built = Transformer(config.model, LayerContext(mesh, config.parallel, device="meta"))
    pieces = [piece for parameter in built.parameters() for piece in slice_of(parameter).pieces]
    engine = {piece.name: tuple(piece.global_shape) for piece in pieces}
    assert dict(count_parameters(config.model).tensors) == engine
    assert count_parameters(config.model).total == sum(parameter.numel() for parameter in built.parameters())


def test_scaled_models_come_close_and_are_valid():
    for wanted in (3e7, 1.2e8, 1e9, 7e9, 6e10):
        model = scale_model(wanted)
        assert count_parameters(model).total == pytest.approx(wanted, rel=0.12)
        assert model.hidden_size == model.num_heads * model.head_dim
        assert model.num_heads % model.num_kv_heads == 0


def test_models_table_says_what_fits():
    rows = tabulate_models(make_planned_machine("a100-80gb", 8))
    assert [row.parameters for row in rows] == sorted(row.parameters for row in rows)
    assert {row.name for row in rows} == set(list_models())
    fitting = {row.name: row.fits for row in rows}
    assert fitting["7b"] and fitting["30b"] and not fitting["llama3-70b"]
    names = [row.name for row in tabulate_models(make_planned_machine("h100", 1))]
    largest = find_largest_fitting(make_planned_machine("h100", 1))
    assert 1e9 < count_parameters(list_models()[largest]).total < 5e9 and names.index(largest) < names.index("7b")
