import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from tests.ops.accuracy import check_against_reference, leaf

SHAPES = [(1, 2), (3, 14), (2, 5, 66), (17, 130), (4, 1024)]
GATED = {
    "swiglu": lambda x: ops.swiglu(x),
    "geglu": lambda x: ops.geglu(x),
    "geglu_tanh": lambda x: ops.geglu(x, "tanh"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GATED)
def test_gated(kernels, dtype, shape, name):
    x = leaf(shape, dtype, kernels.device, scale=3.0)
    gradient = torch.randn((*shape[:-1], shape[-1] // 2), device=kernels.device)
    check_against_reference(GATED[name], GATED[name], [x], [gradient])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_bias_gelu(kernels, dtype, shape, approximate, with_bias):
    x = leaf(shape, dtype, kernels.device, scale=3.0)
    bias = leaf(shape[-1:], dtype, kernels.device) if with_bias else None
    inputs = [x, bias, approximate]
    check_against_reference(ops.bias_gelu, ops.bias_gelu, inputs, [torch.randn(shape, device=kernels.device)])


@pytest.mark.parametrize("name", ["swiglu", "geglu", "bias_gelu"])
def test_far_from_zero(kernels, name):
    edge = torch.tensor([-1e4, -104.0, -90.0, -20.0, -5.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 5.0, 20.0, 90.0, 1e4])
    x = edge if name == "bias_gelu" else torch.cat([edge, torch.ones_like(edge)])
    x = x[None].to(kernels.device).requires_grad_()
    function = getattr(ops, name)
    check_against_reference(function, function, [x], [torch.ones(1, len(edge), device=kernels.device)])


def test_inplace_backward_overwrites_its_input_once(kernels):
    raw = leaf((5, 34), torch.float32, kernels.device)
    (want,) = torch.autograd.grad(ops.swiglu(raw).sum(), [raw])
    x = raw * 1.0
    y = ops.swiglu(x, inplace_backward=True).sum()
    (got,) = torch.autograd.grad(y, [raw], retain_graph=True)
    assert torch.equal(got, want)
    assert torch.equal(x.detach(), want)  # the input's memory holds the gradient now
    with pytest.raises(ConfigError, match="one backward pass"):
        torch.autograd.grad(y, [raw])


def test_bad_arguments_are_named(kernels):
    with pytest.raises(ConfigError, match="last dim must be"):
        ops.swiglu(torch.ones(2, 3))
    with pytest.raises(ConfigError, match="bias has shape"):
        ops.bias_gelu(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ConfigError, match="approximate='exact'"):
        ops.bias_gelu(torch.ones(2, 4), None, "exact")


def test_empty(kernels):
    x = leaf((0, 8), torch.float32, kernels.device)
    y = ops.swiglu(x)
    assert y.shape == (0, 4) and torch.autograd.grad(y.sum(), [x])[0].shape == (0, 8)
