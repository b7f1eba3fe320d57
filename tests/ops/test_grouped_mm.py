import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.backend import use_backend
from tests.ops.accuracy import check_against_reference, leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [2, 2, 0, 0], [0, 0, 0, 0]], ids=str)
def test_grouped_mm(dtype, counts):
    """Nine rows: runs of no rows, and rows behind the last run."""
    torch.manual_seed(0)
    x, weight = leaf((9, 16), dtype, "cpu"), leaf((4, 24, 16), dtype, "cpu")
    counts = torch.tensor(counts)

    def run(x, weight):
        return ops.grouped_mm(x, weight, counts)

    y, dx, dweight = check_against_reference(run, run, [x, weight], [torch.randn(9, 24)])
    end = int(counts.sum())
    assert not y[end:].any() and not dx[end:].any() and not dweight[counts == 0].any()


def test_torchs_grouped_product_agrees():
    """What bf16 takes on a GPU, by its answers on a CPU: the layouts that are handed to it are those that it wants."""
    grouped = getattr(torch, "_grouped_mm", None)
    if grouped is None:
        pytest.skip("this torch has no _grouped_mm")
    x, weight, dy = torch.randn(9, 16), torch.randn(4, 24, 16), torch.randn(9, 24)
    counts = torch.tensor([3, 0, 5, 1])
    ends = counts.cumsum(0).int()
    x.requires_grad_(), weight.requires_grad_()
    y = ops.grouped_mm(x, weight, counts)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    with torch.no_grad():
        torch.testing.assert_close(grouped(x, weight.transpose(-1, -2), offs=ends), y)
        torch.testing.assert_close(grouped(dy, weight, offs=ends), dx)
        torch.testing.assert_close(grouped(dy.t(), x, offs=ends), dweight)


def test_only_what_is_asked_for():
    x, weight, counts = leaf((4, 3), torch.float32, "cpu"), leaf((2, 5, 3), torch.float32, "cpu"), torch.tensor([1, 3])
    (dx,) = torch.autograd.grad(ops.grouped_mm(x, weight.detach(), counts).sum(), [x])
    (dweight,) = torch.autograd.grad(ops.grouped_mm(x.detach(), weight, counts).sum(), [weight])
    with use_backend("reference"):
        want = torch.autograd.grad(ops.grouped_mm(x, weight, counts).sum(), [x, weight])
    torch.testing.assert_close((dx, dweight), want)


def test_empty():
    y = ops.grouped_mm(torch.zeros(0, 4), torch.zeros(2, 3, 4), torch.tensor([0, 0]))
    assert y.shape == (0, 3)


def test_a_whole_mixture_against_every_expert_for_every_token():
    torch.manual_seed(0)
    tokens, hidden, inner, experts, top_k = 23, 12, 20, 6, 2
    x, gate = leaf((tokens, hidden), torch.float32, "cpu"), leaf((experts, hidden), torch.float32, "cpu")
    up = leaf((experts, 2 * inner, hidden), torch.float32, "cpu", 0.3)
    down = leaf((experts, hidden, inner), torch.float32, "cpu", 0.3)

    routing = ops.moe_router(x @ gate.t(), top_k, normalize=True)
    row_map = ops.moe_row_map(routing.experts, experts)
    assert torch.equal(row_map.counts, routing.counts)
    inside = ops.swiglu(ops.grouped_mm(ops.moe_permute(x, row_map), up, row_map.counts))
    got = ops.moe_unpermute(ops.grouped_mm(inside, down, row_map.counts), row_map, routing.weights)

    scores = (x @ gate.t()).softmax(-1)
    kept = torch.zeros_like(scores).scatter(-1, routing.experts, 1.0) * scores
    kept = kept / kept.sum(-1, keepdim=True)
    wide = torch.einsum("th,efh->tef", x, up)
    every = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(wide[..., :inner]) * wide[..., inner:], down)
    want = (every * kept.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    gradient = torch.randn_like(want)
    leaves = [x, gate, up, down]
    for a, b in zip(
        torch.autograd.grad(got, leaves, gradient), torch.autograd.grad(want, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bad_arguments_are_named():
    x, weight, counts = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([1, 3])
    for arguments, message in [
        ((x, torch.zeros(2, 5, 4), counts), "weight"),
        ((x, weight.double(), counts), "weight torch.float64"),
        ((x, weight, counts.int()), "counts is torch.int32"),
        ((x, weight, torch.tensor([1])), "counts is"),
        ((x, weight, torch.tensor([1, 4])), "counts sums to 5"),
        ((x, weight, torch.tensor([-1, 4])), "none negative"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ops.grouped_mm(*arguments)
