"""What every op does with tensors that no kernel serves: with ops.backend=native an error that names the argument, and
strided or empty ones give what contiguous ones do."""

import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops import backend
from megalm.ops.backend import use_backend

ROWS, SIZE = 6, 16
LABELS = torch.arange(ROWS) % SIZE
ANGLES = torch.rand(ROWS, 1, 1, 4)
ADAMW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 1}


def x(*shape):
    return torch.randn(*(shape or (ROWS, SIZE)))


def updated(master, grad, exp_avg, exp_avg_sq):
    tensors = [t.clone(memory_format=torch.preserve_format) for t in (master, grad, exp_avg, exp_avg_sq)]
    ops.adamw_(*tensors, **ADAMW)
    return tensors[0]


def turned(x):
    return ops.rotary_(x.clone(memory_format=torch.preserve_format), ANGLES.cos(), ANGLES.sin())


# Each op with its floating-point tensors by name.
OPS = {
    "rms_norm": (lambda x, weight: ops.rms_norm(x, weight, 1e-5), {"x": x(), "weight": x(SIZE)}),
    "add_rms_norm": (
        lambda x, residual, weight: ops.add_rms_norm(x, residual, weight, 1e-5)[0],
        {"x": x(), "residual": x(), "weight": x(SIZE)},
    ),
    "layer_norm": (
        lambda x, weight, bias: ops.layer_norm(x, weight, bias, 1e-5),
        {"x": x(), "weight": x(SIZE), "bias": x(SIZE)},
    ),
    "add_layer_norm": (
        lambda x, residual, weight, bias: ops.add_layer_norm(x, residual, weight, bias, 1e-5)[0],
        {"x": x(), "residual": x(), "weight": x(SIZE), "bias": x(SIZE)},
    ),
    "swiglu": (ops.swiglu, {"x": x()}),
    "geglu": (ops.geglu, {"x": x()}),
    "bias_gelu": (ops.bias_gelu, {"x": x(), "bias": x(SIZE)}),
    "bias_dropout_add": (
        lambda x, residual, bias: ops.bias_dropout_add(x, residual, bias, p=0.5, seed=1),
        {"x": x(), "residual": x(), "bias": x(SIZE)},
    ),
    "causal_softmax": (ops.causal_softmax, {"scores": x(2, 3, ROWS, SIZE)}),
    "rotary": (lambda x: ops.rotary(x, ANGLES.cos(), ANGLES.sin()), {"x": x(ROWS, 2, 3, 8)}),
    "rotary_": (turned, {"x": x(ROWS, 2, 3, 8)}),
    "cross_entropy": (lambda logits: ops.cross_entropy(logits, LABELS), {"logits": x()}),
    "adamw_": (updated, {"master": x(SIZE), "grad": x(SIZE), "exp_avg": x(SIZE), "exp_avg_sq": x(SIZE).square()}),
    "update_squares": (
        lambda grad, exp_avg_sq: ops.update_squares(grad, exp_avg_sq, [SIZE], beta2=0.9, eps=1e-8, step=1),
        {"grad": x(SIZE), "exp_avg_sq": x(SIZE).square()},
    ),
    "l2_norm_nonfinite": (lambda tensor: ops.l2_norm_nonfinite([tensor]), {"tensor": x()}),
}
ARGUMENTS = [(op, name) for op, (_, tensors) in OPS.items() for name in tensors]
native = pytest.mark.skipif(backend.find_library() is None, reason="megalm._C is not built")


@native
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
@pytest.mark.parametrize("change", ["double", "integer", "device"])
def test_native_names_the_argument(op, name, change):
    function, tensors = OPS[op]
    if op == "l2_norm_nonfinite" and change == "device":
        pytest.skip("its tensors may be anywhere: what no kernel reaches is summed by the reference")
    altered = {"double": lambda t: t.double(), "integer": lambda t: t.int(), "device": lambda t: t.to("meta")}[change]
    with use_backend("native"), pytest.raises(ConfigError, match=rf"{name}\b") as caught:
        function(**{**tensors, name: altered(tensors[name])})
    assert op in str(caught.value)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_strided_arguments(op, name, choice):
    """Every second element of a tensor whose others are NaN, in the last dim and in the first."""
    function, tensors = OPS[op]
    want = function(**tensors)
    for dim in (0, tensors[name].dim() - 1):
        shape = [n * 2 if d == dim else n for d, n in enumerate(tensors[name].shape)]
        strided = torch.full(shape, torch.nan).index_select(dim, torch.arange(shape[dim]))[
            tuple(slice(None, None, 2) if d == dim else slice(None) for d in range(len(shape)))
        ]
        strided.copy_(tensors[name])
        assert not strided.is_contiguous() or strided.numel() <= 1
        with use_backend(choice):
            torch.testing.assert_close(function(**{**tensors, name: strided}), want, rtol=1e-5, atol=1e-6)


def test_empty_tensors():
    weight = torch.ones(SIZE)
    empty = {
        "rms_norm": ops.rms_norm(x(0, SIZE), weight, 1e-5),
        "add_layer_norm": ops.add_layer_norm(x(0, SIZE), x(0, SIZE), weight, weight, 1e-5)[0],
        "bias_gelu": ops.bias_gelu(x(0, SIZE), weight),
        "bias_dropout_add": ops.bias_dropout_add(x(0, SIZE), p=0.5, seed=0),
        "causal_softmax": ops.causal_softmax(x(0, 2, 3, 3)),
        "rotary": ops.rotary(x(ROWS, 0, 2, 8), ANGLES.cos(), ANGLES.sin()),
        "cross_entropy": ops.cross_entropy(x(0, SIZE), LABELS[:0]),
        "update_squares": ops.update_squares(x(0), x(0), [], beta2=0.9, eps=1e-8, step=1),
    }
    assert {name: y.numel() for name, y in empty.items()} == dict.fromkeys(empty, 0)
    nothing = [torch.empty(0) for _ in range(4)]
    ops.adamw_(*nothing, **ADAMW)
    assert ops.l2_norm_nonfinite(nothing).tolist() == [0.0, 0.0]


@native
def test_empty_gradients():
    bias = torch.ones(SIZE, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.bias_gelu(x(0, SIZE), bias).sum(), [bias])
    assert torch.equal(gradient, torch.zeros(SIZE))
