"""What a configuration leaves out is one number for everybody, and a layer's spec says what it is made of."""

from dataclasses import replace

import pytest

from megalm.architecture.blocks import AttentionSpec, MixtureSpec, MLPSpec
from megalm.architecture.flops import count_forward_flops
from megalm.architecture.layers import find_shared_layer, specify_layers
from megalm.architecture.shape import resolve_shape
from megalm.architecture.tensors import count_parameters
from megalm.config.model import ModelConfig, MoEConfig
from megalm.pipeline.partition import count_layer_costs
from megalm.plan.layout import Layout, explain_indivisible


def model(**fields) -> ModelConfig:
    return ModelConfig(
        **{"num_layers": 4, "hidden_size": 640, "num_heads": 10, "vocab_size": 999, "seq_length": 96, **fields}
    )


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2}, {"head_dim": 32}, {"moe": MoEConfig(num_experts=4)}])
def test_what_is_left_out_costs_the_same_as_when_it_is_written(activation, fields):
    """A gated MLP's default width is 8/3 of the model's, not four times it, for whoever asks."""
    bare, full = model(activation=activation, **fields), model(activation=activation, **fields)
    full.moe = replace(full.moe)
    full.fill_in()
    assert count_layer_costs(bare) == count_layer_costs(full)
    assert count_forward_flops(bare) == count_forward_flops(full)
    assert count_parameters(bare) == count_parameters(full)
    layout = Layout(tensor=5, data=2, global_batch=2)
    assert explain_indivisible(bare, layout) == explain_indivisible(full, layout)


def test_the_default_width_of_a_gated_mlp_by_hand():
    assert resolve_shape(model()).ffn_hidden_size == 1728  # 8/3 of 640 is 1706.7: the next multiple of 64
    assert resolve_shape(model(activation="gelu")).ffn_hidden_size == 2560


def test_resolving_leaves_the_configuration_as_it_was():
    bare = model(moe=MoEConfig(num_experts=2))
    resolve_shape(bare)
    assert bare == model(moe=MoEConfig(num_experts=2))


def test_a_stage_costs_what_the_planner_counts():
    made = model(num_kv_heads=5, moe=MoEConfig(num_experts=8, top_k=3, num_shared_experts=1))
    assert sum(count_layer_costs(made).layers) == count_forward_flops(made).layers


def test_a_layer_says_what_it_is_made_of():
    attention, mlp = specify_layers(model(num_kv_heads=2, norm_placement="post"))[0].sublayers
    assert isinstance(attention.block, AttentionSpec) and isinstance(mlp.block, MLPSpec)
    assert (attention.block.query_width, attention.block.key_width) == (640, 128)
    assert attention.norm_output and mlp.norm_output
    assert isinstance(find_shared_layer(model(moe=MoEConfig(num_experts=2))).mlp, MixtureSpec)


@pytest.mark.parametrize(("scope", "query", "key"), [("head", 64, 64), ("full", 640, 128)])
def test_norms_of_queries_and_keys_are_as_wide_as_what_they_normalise(scope, query, key):
    block = find_shared_layer(model(num_kv_heads=2, qk_norm=True, qk_norm_scope=scope)).attention
    tensors = dict(block.list_tensors("attention"))
    assert tensors["attention.query_norm.weight"] == (query,) and tensors["attention.key_norm.weight"] == (key,)


def test_equal_models_have_equal_specs_and_others_have_not():
    assert hash(find_shared_layer(model())) == hash(find_shared_layer(model())) and find_shared_layer(
        model()
    ) == find_shared_layer(model())
    for change in ({"qkv_bias": True}, {"activation": "gelu"}, {"clip_qkv": 8.0}, {"parallel_residual": True}):
        assert find_shared_layer(model(**change)) != find_shared_layer(model()), change


def test_one_layer_is_not_asked_of_a_model_whose_layers_differ(monkeypatch):
    import megalm.architecture.layers as module

    mixed = (*specify_layers(model()), *specify_layers(model(qkv_bias=True)))
    monkeypatch.setattr(module, "specify_layers", lambda _: mixed)
    with pytest.raises(ValueError, match="differ"):
        find_shared_layer(model(name="asked for the first time"))


def test_a_changed_configuration_is_another_model():
    """What was resolved is kept by a model's values, also those of its groups."""
    changing = model(moe=MoEConfig(num_experts=4))
    before = (resolve_shape(changing), find_shared_layer(changing), count_layer_costs(changing))
    assert resolve_shape(changing) is before[0] and find_shared_layer(replace(changing)) is before[1]
    changing.moe.top_k = 1
    assert find_shared_layer(changing).mlp.top_k == 1
    changing.hidden_size = 320
    assert (resolve_shape(changing).hidden_size, find_shared_layer(changing).mlp.expert.ffn_hidden_size) == (320, 896)
    assert count_layer_costs(changing) != before[2]
    changing.rope_scaling.kind = "linear"
    assert resolve_shape(changing) == resolve_shape(model(hidden_size=320))
