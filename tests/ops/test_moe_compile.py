"""The mixture's and the 8-bit ops under opcheck, in a full graph of torch.compile, and in every order of the emulator."""

import pytest
import torch

from megalm import ops
from megalm.ops import backend
from megalm.ops.backend import use_backend
from megalm.ops.grouped_mm import _GROUPED
from megalm.ops.moe_permute import _PERMUTE, _ROW_MAP, _UNPERMUTE
from megalm.ops.moe_router import _ROUTER
from megalm.ops.quantize import _DEQUANTIZE, _QUANTIZE
from tests.ops.conftest import SANITIZED

natively = pytest.mark.skipif(
    backend.find_library() is None or bool(SANITIZED), reason="needs megalm._C outside of the sanitizer"
)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def rows_of(experts):
    return ops.moe_row_map(torch.tensor(experts), 3).rows


CASES = {
    "router": (_ROUTER.op, lambda: (leaf(5, 8), torch.rand(8), 2, 1, True, 2.0, 4, 2, 1)),
    "router_softmax": (_ROUTER.op, lambda: (leaf(5, 8), None, 3, 0, False, 1.0, 0, 0, 1)),
    "row_map": (_ROW_MAP, lambda: (torch.tensor([[0, 2], [1, 0]]), 3)),
    "permute": (_PERMUTE.op, lambda: (leaf(2, 6), rows_of([[0, 2], [1, -1]]))),
    "unpermute": (_UNPERMUTE.op, lambda: (leaf(4, 6), rows_of([[0, 2], [1, -1]]), leaf(2, 2))),
    "unpermute_plain": (_UNPERMUTE.op, lambda: (leaf(4, 6), rows_of([[0, 2], [1, 0]]), None)),
    "grouped_mm": (_GROUPED.op, lambda: (leaf(5, 4), leaf(3, 6, 4), torch.tensor([2, 0, 3]))),
    "quantize": (_QUANTIZE, lambda: (torch.randn(3, 8), torch.float8_e5m2, 0, None, False, True)),
    "quantize_rows": (_QUANTIZE, lambda: (torch.randn(3, 8), torch.float8_e4m3fn, 1, None, True, True)),
    "dequantize": (
        _DEQUANTIZE,
        lambda: (torch.randn(3, 8).to(torch.float8_e5m2), torch.ones(1), 0, torch.bfloat16),
    ),
}


@natively
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op, inputs = CASES[name]
    # opcheck compares inputs before and after by arithmetic, which 8-bit floats do not have.
    tests = ("test_faketensor",) if name == "dequantize" else "ALL"
    torch.library.opcheck(op, inputs(), test_utils=tests)


def mixture(x, gate, up, down):
    routing = ops.moe_router(x @ gate.t(), 2, normalize=True)
    row_map = ops.moe_row_map(routing.experts, 4)
    inside = ops.swiglu(ops.grouped_mm(ops.moe_permute(x, row_map), up, row_map.counts))
    y = ops.moe_unpermute(ops.grouped_mm(inside, down, row_map.counts), row_map, routing.weights)
    return y, ops.load_balance_loss(routing.counts, routing.probability, 2) + ops.router_z_loss(routing.log_z)


@natively
def test_full_graph_with_gradients():
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [leaf(9, 8), leaf(4, 8), leaf(4, 12, 8), leaf(4, 8, 6)]
    with use_backend("native"):
        want = mixture(*inputs)
        got = torch.compile(mixture, fullgraph=True, backend="aot_eager")(*inputs)
    gradients = [torch.randn(9, 8), torch.tensor(1.0)]
    for a, b in zip(
        [*got, *torch.autograd.grad(got, inputs, gradients)],
        [*want, *torch.autograd.grad(want, inputs, gradients)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def routes(x):
    for score in ("softmax", "sigmoid"):
        routing = ops.moe_router(x, 3, score=score, normalize=True, groups=6, top_groups=3, group_scores=2)
        total = routing.weights.square().sum() + routing.probability.square().sum() + routing.log_z.sum()
        yield from routing
        yield from torch.autograd.grad(total, [x])


def rows(x):
    row_map = ops.moe_row_map((x[:, :4].detach() * 40).long() % 40 - 1, 38)
    weights = torch.rand(x.shape[0], 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = ops.moe_permute(x, row_map)
    out = ops.moe_unpermute(y.sin(), row_map, weights)
    yield from (*row_map, y, out)
    yield from torch.autograd.grad(out.square().sum(), [x, weights])


def codes(x):
    for block in (None, (1, 128), (128, 128)):
        q = ops.fp8_quantize(x, block=block, transpose=True)
        yield from (part.contiguous().view(torch.uint8) for part in q if part is not None)
        yield ops.fp8_dequantize(q.data, q.scale_inv, block=block)


@pytest.mark.skipif(not SANITIZED, reason="runs in the emulator: tests/csrc/test_sanitized.py")
@pytest.mark.parametrize("function", [routes, rows, codes])
def test_bitwise_the_same_in_every_order(kernels, function):
    if kernels.place != "emulated":
        pytest.skip("about the emulator")
    library, results = backend.get_library(), []
    x = torch.randn(150, 36, requires_grad=True)
    launches = library.emulator_launches()
    for order in (0, 1, 5):
        library.set_emulator_order(order)
        results.append(list(function(x)))
    assert library.emulator_launches() > launches + 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
