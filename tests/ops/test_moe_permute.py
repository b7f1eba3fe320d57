import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.backend import use_backend
from megalm.ops.moe_permute import moe_row_map_reference
from tests.ops.accuracy import check_against_reference, leaf

# (tokens, top_k, experts, hidden)
SHAPES = [(1, 1, 1, 2), (7, 2, 5, 33), (40, 3, 8, 64), (19, 4, 37, 257), (130, 6, 160, 8)]


def choices(tokens, top_k, experts, device, dropped=False):
    lowest, highest = (-1, experts + 1) if dropped else (0, experts)
    return torch.randint(lowest, highest, (tokens, top_k), device=device)


@pytest.mark.parametrize("shape", [*SHAPES, (700, 2, 1000, 1)], ids=str)
@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
def test_row_map(kernels, shape, dropped):
    tokens, top_k, experts, _ = shape
    chosen = choices(tokens, top_k, experts, kernels.device, dropped)
    got, want = ops.moe_row_map(chosen, experts), moe_row_map_reference(chosen, experts)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    flat, keys = chosen.flatten(), []
    for slot in got.sources.tolist():
        expert = int(flat[slot])
        keys.append((expert if 0 <= expert < experts else experts, slot))
    assert keys == sorted(keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
def test_permute(kernels, dtype, shape, dropped):
    tokens, top_k, experts, hidden = shape
    row_map = ops.moe_row_map(choices(tokens, top_k, experts, kernels.device, dropped), experts)
    x = leaf((tokens, hidden), dtype, kernels.device)
    gradient = torch.randn(tokens * top_k, hidden, device=kernels.device)
    y, dx = check_against_reference(
        lambda x: ops.moe_permute(x, row_map), lambda x: ops.moe_permute(x, row_map), [x], [gradient]
    )
    for slot, row in enumerate(row_map.rows.flatten().tolist()):
        assert torch.equal(y[row], x[slot // top_k]) if row >= 0 else not y[-1 - row].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
def test_unpermute(kernels, dtype, shape, dropped, weighted):
    tokens, top_k, experts, hidden = shape
    row_map = ops.moe_row_map(choices(tokens, top_k, experts, kernels.device, dropped), experts)
    y = leaf((tokens * top_k, hidden), dtype, kernels.device)
    inputs = [y, leaf((tokens, top_k), torch.float32, kernels.device)] if weighted else [y]

    def run(y, weights=None):
        return ops.moe_unpermute(y, row_map, weights)

    check_against_reference(run, run, inputs, [torch.randn(tokens, hidden, device=kernels.device)])


def test_there_and_back(kernels):
    row_map = ops.moe_row_map(choices(50, 4, 16, kernels.device), 16)
    x = torch.randn(50, 24, device=kernels.device)
    weights = torch.full((50, 4), 0.25, device=kernels.device)
    torch.testing.assert_close(ops.moe_unpermute(ops.moe_permute(x, row_map), row_map, weights), x)


def test_weights_without_gradient_and_gradient_of_weights_alone(kernels):
    row_map = ops.moe_row_map(choices(9, 2, 4, kernels.device), 4)
    y, weights = leaf((18, 6), torch.float32, kernels.device), leaf((9, 2), torch.float32, kernels.device)
    for inputs in ([y.detach(), weights], [y, weights.detach()]):
        wanted = [i for i in inputs if i.requires_grad]
        results = []
        for backend in ("native", "reference"):
            with use_backend(backend):
                out = ops.moe_unpermute(inputs[0], row_map, inputs[1])
                results.append(torch.autograd.grad(out.square().sum(), wanted))
        torch.testing.assert_close(*results)


def test_what_a_dropped_row_holds_does_not_matter(kernels):
    chosen = torch.tensor([[0, -1], [1, 0]], device=kernels.device)
    row_map = ops.moe_row_map(chosen, 2)
    assert row_map.rows.tolist() == [[0, -4], [2, 1]] and row_map.counts.tolist() == [2, 1]
    y = torch.ones(4, 3, device=kernels.device)
    y[3] = torch.nan
    y.requires_grad_()
    weights = torch.ones(2, 2, device=kernels.device, requires_grad=True)
    out = ops.moe_unpermute(y, row_map, weights)
    assert out.tolist() == [[1.0] * 3, [2.0] * 3]
    dy, dweights = torch.autograd.grad(out.sum(), [y, weights])
    assert dy.isfinite().all() and not dy[3].any() and dweights.tolist() == [[3.0, 0.0], [3.0, 3.0]]


@pytest.mark.parametrize("tokens, top_k", [(0, 2), (3, 0)])
def test_empty(kernels, tokens, top_k):
    row_map = ops.moe_row_map(torch.zeros(tokens, top_k, dtype=torch.int64, device=kernels.device), 4)
    assert row_map.counts.tolist() == [0] * 4
    x = leaf((tokens, 5), torch.float32, kernels.device)
    y = ops.moe_permute(x, row_map)
    out = ops.moe_unpermute(y, row_map)
    assert y.shape == (0, 5) and out.shape == (tokens, 5) and not out.any()
    assert not torch.autograd.grad(out.sum(), [x])[0].any()


def test_row_map_does_not_depend_on_the_number_of_threads(kernels):
    if kernels.place != "cpu":
        pytest.skip("about the CPU's threads")
    chosen, threads, results = choices(20000, 4, 60, "cpu", True), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.moe_row_map(chosen, 60))
    finally:
        torch.set_num_threads(threads)
    want = moe_row_map_reference(chosen, 60)
    assert all(torch.equal(a, b) for other in results for a, b in zip(want, other, strict=True))


def test_bad_arguments_are_named(kernels):
    row_map = ops.moe_row_map(torch.zeros(3, 2, dtype=torch.int64), 4)
    with pytest.raises(ConfigError, match="experts is torch.int32"):
        ops.moe_row_map(torch.zeros(3, 2, dtype=torch.int32), 4)
    with pytest.raises(ConfigError, match="num_experts=0"):
        ops.moe_row_map(torch.zeros(3, 2, dtype=torch.int64), 0)
    with pytest.raises(ConfigError, match="x has shape"):
        ops.moe_permute(torch.zeros(4, 5), row_map)
    with pytest.raises(ConfigError, match="y has shape"):
        ops.moe_unpermute(torch.zeros(5, 5), row_map)
    with pytest.raises(ConfigError, match="weights has shape"):
        ops.moe_unpermute(torch.zeros(6, 5), row_map, torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="row_map.rows is"):
        ops.moe_permute(torch.zeros(3, 5), row_map._replace(rows=row_map.rows.int()))
    with pytest.raises(ConfigError, match="sources has shape"):
        ops.moe_permute(torch.zeros(3, 5), row_map._replace(sources=row_map.sources[:2]))


def test_a_wrong_row_map_reads_and_writes_nothing_outside(kernels):
    rows = torch.tensor([[10**12, -(10**12)], [0, 1]], device=kernels.device)
    row_map = ops.RowMap(rows, torch.arange(4, device=kernels.device), torch.ones(2, dtype=torch.int64))
    x = torch.ones(2, 8, device=kernels.device)
    assert ops.moe_permute(x, row_map)[:2].tolist() == [[1.0] * 8] * 2
    assert ops.moe_unpermute(torch.ones(4, 8, device=kernels.device), row_map).tolist() == [[0.0] * 8, [2.0] * 8]
