import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops import backend
from tests.ops.accuracy import check_against_reference, leaf

SHAPES = [(1, 2), (3, 7), (5, 2, 33), (37, 64), (9, 257), (4, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "layer_norm_bias"])
def test_norm(kernels, dtype, shape, name):
    x, weight, bias = (leaf(s, dtype, kernels.device) for s in (shape, shape[-1:], shape[-1:]))
    inputs = {"rms_norm": [x, weight, 1e-5], "layer_norm": [x, weight, None, 1e-5]}.get(name, [x, weight, bias, 1e-5])
    function = getattr(ops, name.removesuffix("_bias"))
    check_against_reference(function, function, inputs, [torch.randn(shape, device=kernels.device)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_norm_with_residual(kernels, dtype, shape, name):
    x, residual = leaf(shape, dtype, kernels.device), leaf(shape, dtype, kernels.device)
    weight, bias = leaf(shape[-1:], dtype, kernels.device), leaf(shape[-1:], dtype, kernels.device)
    inputs = [x, residual, weight, 1e-6] if name == "add_rms_norm" else [x, residual, weight, bias, 1e-6]
    function = getattr(ops, name)
    gradients = [torch.randn(shape, device=kernels.device) for _ in range(2)]
    _, new_residual, dx, dresidual, *_ = check_against_reference(function, function, inputs, gradients)
    assert torch.equal(new_residual, x + residual) and torch.equal(dx, dresidual)


def test_layer_norm_of_a_large_mean_does_not_cancel(kernels):
    x = torch.randn(8, 100, device=kernels.device) + 1000.0
    weight = torch.ones(100, device=kernels.device)
    y = ops.layer_norm(x, weight, None, 1e-5)
    truth = torch.nn.functional.layer_norm(x.double(), (100,), weight.double(), None, 1e-5)
    assert (y - truth).abs().max() < 1e-3


@pytest.mark.parametrize("size", [8192, 8201])
def test_rows_longer_than_what_is_held(kernels, size):
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight, bias = (leaf(s, dtype, kernels.device) for s in ((3, size), (3, size), (size,), (size,)))
        gradients = [torch.randn(3, size, device=kernels.device) for _ in range(2)]
        check_against_reference(ops.add_layer_norm, ops.add_layer_norm, [x, residual, weight, bias, 1e-5], gradients)
        check_against_reference(ops.rms_norm, ops.rms_norm, [x, weight, 1e-5], gradients[:1])


def test_copies_of_two_rows_lie_apart(kernels, dtype):
    """The longest rows of which a CPU has two on their way, 4 KB, and one element more."""
    for size in (4096 // dtype.itemsize, 4096 // dtype.itemsize + 1):
        x, residual, weight = (leaf(s, dtype, kernels.device) for s in ((5, size), (5, size), (size,)))
        y, h = ops.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(h, x + residual)
        with backend.use_backend("reference"):
            torch.testing.assert_close(y, ops.add_rms_norm(x, residual, weight, 1e-5)[0])


def test_more_rows_than_a_warp_has_statistics_at_hand(kernels):
    """A CUDA block takes every 264th row, and each lane of a warp has the statistics of one of the next 32."""
    rows = 264 * 32 + 3
    x, weight, bias = (leaf(s, torch.float32, kernels.device) for s in ((rows, 4), (4,), (4,)))
    inputs = [x, weight, bias, 1e-5]
    check_against_reference(ops.layer_norm, ops.layer_norm, inputs, [torch.randn(rows, 4, device=kernels.device)])


def test_only_one_output_used(kernels):
    x, residual, weight = (leaf(s, torch.float32, kernels.device) for s in ((4, 16), (4, 16), (16,)))
    for index in (0, 1):
        got = torch.autograd.grad(ops.add_rms_norm(x, residual, weight, 1e-5)[index].sum(), [x], allow_unused=True)
        with backend.use_backend("reference"):
            want = torch.autograd.grad(ops.add_rms_norm(x, residual, weight, 1e-5)[index].sum(), [x])
        torch.testing.assert_close(got, want)


def test_strided_and_empty_inputs(kernels):
    x = leaf((6, 10), torch.float32, kernels.device)
    weight = leaf((6,), torch.float32, kernels.device)
    check_against_reference(ops.rms_norm, ops.rms_norm, [x.t(), weight, 1e-5], [torch.randn(10, 6, device=x.device)])
    empty = leaf((0, 6), torch.float32, kernels.device)
    y = ops.rms_norm(empty, weight, 1e-5)
    assert y.shape == (0, 6)
    (dweight,) = torch.autograd.grad(y.sum(), [weight])
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_weight_gradient_does_not_depend_on_the_number_of_threads(kernels):
    if kernels.place != "cpu":
        pytest.skip("about the CPU's threads")
    x, weight = leaf((300, 256), torch.float32, "cpu"), leaf((256,), torch.float32, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(ops.rms_norm(x, weight, 1e-5).square().sum(), [weight])[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_arguments_are_named(kernels):
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ConfigError, match="residual has shape"):
        ops.add_rms_norm(x, torch.ones(2, 5), weight, 1e-5)
    with pytest.raises(ConfigError, match="x has shape"):
        ops.rms_norm(x, torch.ones(5), 1e-5)
    with pytest.raises(ConfigError, match="bias has shape"):
        ops.layer_norm(x, weight, torch.ones(3), 1e-5)
    with pytest.raises(ConfigError, match="weight is torch.bfloat16, but x is torch.float32"):
        ops.rms_norm(x, weight.bfloat16(), 1e-5)
    with pytest.raises(ConfigError, match="x is torch.float64"):
        ops.rms_norm(x.double(), weight.double(), 1e-5)
