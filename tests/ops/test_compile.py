"""The library ops behind the fast eager way: opcheck, and torch.compile with a full graph."""

import importlib

import pytest
import torch

from megalm import ops
from megalm.ops import backend
from megalm.ops.backend import use_backend
from tests.ops.conftest import SANITIZED

pytestmark = [
    pytest.mark.skipif(backend.find_library() is None, reason="megalm._C is not built"),
    pytest.mark.skipif(bool(SANITIZED), reason="no kernels of its own to look at"),
]


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def library_op(module, name):
    found = getattr(importlib.import_module(f"megalm.ops.{module}"), name)
    return getattr(found, "op", found)


# Of adamw_: no scale, skip flag nor segments; then its numbers.
ADAMW = (None, None, None, None, 0.1, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 1.0)
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
    "cross_entropy_statistics": (
        ("cross_entropy", "_STATISTICS"),
        lambda: (torch.randn(3, 8), torch.tensor([2, 9, -1]), 1, 7, True),
    ),
    "cross_entropy_gradient": (
        ("cross_entropy", "_GRADIENT"),
        lambda: (torch.randn(3, 8), torch.tensor([2, 9, -1]), *torch.rand(3, 3), 1, 7, 0.1, 0.01),
    ),
    "adamw": (("adamw", "_UPDATE"), lambda: (*torch.rand(4, 9), torch.zeros(9, dtype=torch.bfloat16), *ADAMW)),
    "adamw_plain": (("adamw", "_UPDATE"), lambda: (*torch.rand(4, 9), None, *ADAMW)),
    "update_squares": (("adamw", "_SQUARES"), lambda: (*torch.rand(2, 9), [4, 5], None, 0.9, 1e-8, 0.1, 1.0)),
    "l2_norm_nonfinite": (("gradient_norm", "_ADD"), lambda: (torch.zeros(2, dtype=torch.float64), torch.randn(9))),
    "sequence_part": (("sequence", "_PART"), lambda: (torch.randn(8, 3, 2), 2, 1, 0, 1, True)),
    "sum_parts": (("sequence", "_SUM_PARTS"), lambda: (torch.randn(3, 8),)),
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


LABELS = torch.tensor([0, 3, 7, -100, 5])
TABLE = torch.rand(5, 1, 1, 2)


def losses(x, w):
    """The ops with a gradient that `block` leaves out."""
    y = ops.rotary_((x * 2.0).view(5, 1, 2, 4), TABLE.cos(), TABLE.sin()).reshape(5, 8)
    rows = torch.cat([y, x[:3]]).view(8, 2, 4)
    turned = ops.sequence_join(ops.sequence_pack(rows, 2, out_dim=1, zigzag=True).sin(), dim=1, out_dim=0)
    plain = ops.sequence_join(ops.sequence_pack(rows, 2).cos())
    whole = ops.cross_entropy(y * 1.0, LABELS, vocab_size=7, z_loss=1e-2, label_smoothing=0.1, inplace_backward=True)
    return whole.sum() + ops.linear_cross_entropy(y, w, LABELS, chunk=3) + (turned * plain).sum()


def update(w, g, m, v):
    """The ops without a gradient."""
    w, m, v, out = w * 1.0, m * 1.0, v * 1.0, torch.zeros(40, dtype=torch.bfloat16)
    skip = ops.l2_norm_nonfinite([g])[1:]
    options = {"beta2": 0.95, "eps": 1e-8, "step": 2}
    squares = ops.update_squares(g, v, [13, 27], **options)
    ops.adamw_(w, g, m, v, lr=0.1, beta1=0.9, weight_decay=0.1, skip=skip, out=out, **options)
    parts = g.view(8, 5)
    return w, m, v, out, squares, ops.sum_parts(parts), ops.sequence_part(parts, 2, 1, zigzag=True)


def test_losses_in_a_full_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [leaf(5, 8), leaf(8, 8)]
    with use_backend("native"):
        want = losses(*inputs)
        got = torch.compile(losses, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # sums of two gradients in another order


def test_an_update_in_a_full_graph():
    torch._dynamo.reset()
    inputs = [*torch.rand(4, 40)]
    with use_backend("native"):
        want = update(*inputs)
        got = torch.compile(update, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
