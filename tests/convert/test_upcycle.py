"""A dense model becomes a mixture of the same function; a checkpoint that lacks an expert is refused by its name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.convert.huggingface import write_folder
from megalm.convert.run import Options, convert
from megalm.convert.source import Source
from megalm.convert.upcycle import upcycle
from megalm.convert.weights import MemoryWeights
from megalm.generate.model import build_model, compute_logits
from megalm.model.transformer import Transformer
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import list_boxes

SIZES = [
    *("+model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.vocab_size=64"),
    "model.seq_length=32",
]


def source(*overrides):
    config = compose_config([*SIZES, *overrides])
    model = Transformer(config.model, LayerContext(Mesh.single()))
    initialize(model, 3)
    weights = MemoryWeights({box.name: box.tensor.clone() for box in list_boxes(model)})
    return Source(path="here", format="megalm", model=config.model, weights=weights, foreign_count=len(weights.names()))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.activation=gelu", "model.linear_bias=true", "model.norm=layernorm", "model.norm_bias=true"],
        ["model.parallel_residual=true", "model.tie_embeddings=false"],
    ],
    ids=["llama", "gpt2", "neox"],
)
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (8, 2), (3, 3)])
def test_the_mixture_computes_what_the_dense_model_does(overrides, experts, top_k):
    dense = source(*overrides)
    mixed = upcycle(dense, experts, top_k)
    assert mixed.model.moe.num_experts == experts and dense.model.moe.num_experts == 0
    tokens = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    wanted = compute_logits(build_model(dense.model, dense.weights), tokens)
    model = build_model(mixed.model, mixed.weights)
    torch.testing.assert_close(compute_logits(model, tokens), wanted, rtol=1e-5, atol=1e-5)
    routers = [box.tensor for box in list_boxes(model) if box.name.endswith("router.weight")]
    assert len(routers) == 2 and all(0.01 < router.std() < 0.03 for router in routers)
    assert not torch.equal(*routers)


def test_what_cannot_be_upcycled_is_refused(tmp_path):
    dense = source()
    with pytest.raises(ConfigError, match="at least 2 experts"):
        upcycle(dense, 1, 1)
    with pytest.raises(ConfigError, match="top_k=5: there are model.moe.num_experts=4"):
        upcycle(dense, 4, 5)
    with pytest.raises(ConfigError, match="has 4 experts in its layers already"):
        upcycle(upcycle(dense, 4, 2), 8, 2)
    for options in (Options("huggingface", upcycle=4), Options("megalm", top_k=4)):
        with pytest.raises(ConfigError, match="has no meaning"):
            convert(tmp_path, tmp_path / "out", options)
    with pytest.raises(ConfigError, match="moments are of another model"):
        convert(tmp_path, tmp_path / "out", Options("megalm", upcycle=4, optimizer=True))


def test_a_missing_expert_is_named_by_layer_and_number():
    mixed = upcycle(source(), 4, 2)
    names = [name for name in mixed.weights.names() if "layers.1.mlp.experts.3." not in name]
    lacking = MemoryWeights({name: mixed.weights.read(name) for name in names})
    with pytest.raises(ConfigError, match=r"the weight layers\.1\.mlp\.experts\.3\.gate\.weight is missing"):
        build_model(mixed.model, lacking)


def test_a_model_that_no_architecture_expresses_leaves_no_folder(tmp_path):
    made = source("model.value_head=true")
    with pytest.raises(ConfigError, match="cannot express model.value_head"):
        write_folder(replace(made, files=[Path(__file__)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
