"""Every parameter of every model that conf/ knows has the role that it has in the network."""

from collections import Counter
from pathlib import Path

import pytest

import megalm
from megalm.config.compose import compose_config
from megalm.model.transformer import Transformer
from megalm.optim.groups import Groups, list_usual_choices
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Role, slice_of

MODELS = sorted(path.stem for path in (Path(megalm.__file__).parent.parent / "conf" / "model").glob("*.yaml"))
MATRICES = {
    f"{layer}.weight"
    for layer in ("attention.query", "attention.key", "attention.value", "attention.output")
    + ("attention.query_down", "attention.query_up", "attention.key_value_down", "attention.key_value_up")
    + ("mlp.gate", "mlp.up", "mlp.down", "merge")
}
WITH_EVERYTHING = [
    "+model=gpt2-124m", "model.qk_norm=true", "model.embedding_norm=true", "model.tie_embeddings=false",
    "model.qkv_bias=true", "model.norm_bias=true",
]  # fmt: skip


def roles(*overrides):
    """Global name -> its role, in a model of four layers without memory."""
    config = compose_config([*overrides, "model.num_layers=4"])
    model = Transformer(config.model, LayerContext(Mesh.single(), config.parallel, device="meta"))
    slices = [slice_of(parameter) for parameter in model.parameters()]
    return {piece.name: slice_ for slice_ in slices for piece in slice_.pieces}, config


def expected_role(name):
    inner = name.split(".", 2)[2] if name.startswith("layers.") else name
    if inner in MATRICES:
        return Role.MATRIX
    if inner == "output.weight":
        return Role.OUTPUT
    if inner in ("embedding.weight", "position_embedding.weight"):
        return Role.EMBEDDING
    if "norm." in inner:
        return Role.NORM
    if inner in ("mlp.router.weight", "mlp.shared_gate.weight"):
        return Role.ROUTER
    if inner in ("mlp.router.bias", "attention.sinks"):
        return Role.BIAS
    if inner.startswith("mlp.experts."):
        return Role.EXPERT_MATRIX if inner.endswith("weight") else Role.BIAS
    if inner.startswith("mlp.shared_expert."):
        return Role.MATRIX if inner.endswith("weight") else Role.BIAS
    if inner.removesuffix(".bias") + ".weight" in MATRICES:
        return Role.BIAS
    raise AssertionError(f"{name}: say in this test what it is")


@pytest.mark.parametrize("model", MODELS)
def test_a_models_parameters_have_their_roles(model):
    found, config = roles(f"+model={model}")
    assert {name: slice_.role for name, slice_ in found.items()} == {name: expected_role(name) for name in found}
    count = Counter(slice_.role for slice_ in found.values())
    assert count[Role.OUTPUT] == (not config.model.tie_embeddings)
    mlp = 2 + ("layers.0.mlp.gate.weight" in found)
    attention = sum(f"layers.0.{name}" in found for name in MATRICES if name.startswith("attention."))
    assert attention == (5 if config.model.latent.key_rank else 4)
    moe = config.model.moe
    inside = [mlp if moe.is_dense(i) else 3 * bool(moe.shared_ffn_hidden_size) for i in range(4)]
    assert count[Role.MATRIX] == 4 * attention + sum(inside)


def test_a_model_with_every_part_has_every_role_of_a_dense_one():
    found, _ = roles(*WITH_EVERYTHING)
    assert {name: slice_.role for name, slice_ in found.items()} == {name: expected_role(name) for name in found}
    assert {slice_.role for slice_ in found.values()} == set(Role) - {Role.ROUTER, Role.EXPERT_MATRIX, Role.STATE}


def test_a_mixture_with_every_part_has_the_roles_of_one():
    words = ["num_experts=4", "score=softmax", "router_bias=true", "num_shared_experts=1", "shared_gate=true"]
    found, _ = roles(*WITH_EVERYTHING, *[f"model.moe.{word}" for word in words])
    assert {name: slice_.role for name, slice_ in found.items()} == {name: expected_role(name) for name in found}
    assert {slice_.role for slice_ in found.values()} == set(Role) - {Role.STATE}


def test_only_what_multiplies_a_hidden_state_decays():
    found, config = roles(*WITH_EVERYTHING)
    groups = Groups(list_usual_choices(config.optim))
    decayed = {name for name, slice_ in found.items() if groups.of(slice_).decay}
    assert decayed == {n for n in found if n.endswith(".weight") and "norm." not in n and "embedding" not in n}
