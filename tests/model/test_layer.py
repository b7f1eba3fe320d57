"""A layer is what its spec says: each rule of the residual stream against the formula, bit by bit, with gradients."""

from dataclasses import replace

import pytest
import torch

from megalm.architecture.blocks import MLPSpec
from megalm.architecture.layers import LayerSpec, find_shared_layer
from megalm.config import ModelConfig, ParallelConfig
from megalm.model.positions import Where
from megalm.model.transformer import Layer
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import slice_of


def spec(**fields) -> LayerSpec:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64, "seq_length": 8, "position": "none"}
    return find_shared_layer(ModelConfig(**{**sizes, "num_kv_heads": 2, **fields}))


def layer(of: LayerSpec, recompute: str = "none") -> Layer:
    made = Layer(of, LayerContext(Mesh.single(), ParallelConfig(recompute=recompute)), index=0, dropout=0.0)
    initialize(made, 3)
    return made


def pre(made, h):
    attended = made.attention(made.attention_norm(h), Where())
    normed, h = made.mlp_norm(attended, h)
    return h + made.mlp(normed, Where())


def post(made, h):
    h = h + made.attention_norm(made.attention(h, Where()))
    return h + made.mlp_norm(made.mlp(h, Where()))


def parallel(made, h):
    return h + made.attention(made.attention_norm(h), Where()) + made.mlp(made.mlp_norm(h), Where())


def results(made, run):
    """Output, and gradients of the input and of every parameter."""
    hidden = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    made.zero_grad()
    output = run(hidden)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, *(parameter.grad for parameter in made.parameters())]


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize(
    ("fields", "formula"),
    [({}, pre), ({"norm_placement": "post"}, post), ({"parallel_residual": True}, parallel)],
)
def test_a_layer_is_its_formula(fields, formula, recompute):
    made = layer(spec(**fields), recompute)
    plain = layer(spec(**fields))
    found = results(made, lambda hidden: made(hidden, Where()))
    wanted = results(plain, lambda hidden: formula(plain, hidden))
    assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_norms_stand_where_each_sublayer_says():
    attention, mlp = spec().sublayers
    made = layer(LayerSpec((attention, replace(mlp, norm_output=True))))
    found = results(made, lambda hidden: made(hidden, Where()))

    def formula(h):
        h = h + made.attention(made.attention_norm(h), Where())
        return h + made.mlp_norm(made.mlp(h, Where()))

    assert all(torch.equal(a, b) for a, b in zip(found, results(made, formula), strict=True))


@pytest.mark.parametrize("together", [False, True])
def test_a_layer_has_as_many_sublayers_as_its_spec(together):
    attention, mlp = spec().sublayers
    made = layer(LayerSpec((attention, mlp, replace(mlp, name="second")), parallel=together))
    assert {name for name, _ in made.spec.list_tensors("layers.0.")} == {
        piece.name for parameter in made.parameters() for piece in slice_of(parameter).pieces
    }
    hidden = torch.randn(8, 2, 32)
    first = layer(LayerSpec((attention, mlp), parallel=together))
    stream = first(hidden, Where())
    added = made.second(made.second_norm(hidden if together else stream), Where())
    torch.testing.assert_close(made(hidden, Where()), stream + added)


def test_a_block_that_no_module_computes_is_refused():
    class Other(MLPSpec):
        """A kind that nobody entered."""

    attention, mlp = spec().sublayers
    other = Other(**vars(mlp.block))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: no module computes a Other"):
        layer(LayerSpec((attention, replace(mlp, block=other))))
