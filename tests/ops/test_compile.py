"""The library ops behind the fast eager way: opcheck, and torch.compile with a full graph."""

import importlib

import pytest
import torch

from megalm import ops
from megalm.ops import backend
from megalm.ops.backend import use_backend
from tests.ops.conftest import SANITIZED

pytestmark = [
    pytest.mark.skipif(backend.library() is None, reason="megalm._C is not built"),
    pytest.mark.skipif(bool(SANITIZED), reason="no kernels of its own to look at"),
]


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def library_op(module, name):
    return getattr(importlib.import_module(f"megalm.ops.{module}"), name).op


CASES = {
    "norm": (("norm", "_NORM"), lambda: (leaf(3, 8), leaf(8), leaf(8), 1e-5, True)),
    "add_norm": (("norm", "_ADD_NORM"), lambda: (leaf(3, 8), leaf(3, 8), leaf(8), None, 1e-5, False)),
    "activation": (("activation", "_ACTIVATION"), lambda: (leaf(3, 8), None, 0, True, False)),
    "bias_gelu": (("activation", "_ACTIVATION"), lambda: (leaf(3, 8), leaf(8), 1, False, False)),
    "dropout": (
        ("dropout", "_DROPOUT"),
        lambda: (leaf(3, 8), leaf(3, 8), leaf(8), 0.5, 7, torch.arange(3), 2),
    ),
    "softmax": (
        ("softmax", "_SOFTMAX"),
        lambda: (leaf(1, 2, 3, 5), 0.5, torch.rand(2), torch.zeros(1, 5, dtype=torch.int32)),
    ),
    "rotary": (("rope", "_ROTARY"), lambda: (leaf(3, 2, 2, 8), torch.rand(3, 1, 1, 4), torch.rand(3, 1, 1, 4), False)),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    where, inputs = CASES[name]
    torch.library.opcheck(library_op(*where), inputs())


def block(x, residual, weight, cos, sin):
    y, h = ops.add_rms_norm(x, residual, weight, 1e-5)
    q = ops.rotary(y.unflatten(-1, (2, 8)), cos, sin).flatten(-2)
    q = ops.bias_dropout_add(q, h, p=0.5, seed=3)
    scores = ops.causal_softmax((q @ q.mT).unsqueeze(0))[0]
    return ops.swiglu(scores @ q) + h[..., :8]


def test_full_graph_with_gradients():
    torch._dynamo.reset()
    inputs = [leaf(5, 2, 16), leaf(5, 2, 16), leaf(16), torch.rand(5, 1, 1, 4), torch.rand(5, 1, 1, 4)]
    with use_backend("native"):
        want = block(*inputs)
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, want)
    gradient = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, inputs[:3], gradient), torch.autograd.grad(want, inputs[:3], gradient), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
