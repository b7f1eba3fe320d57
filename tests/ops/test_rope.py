import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from tests.ops.accuracy import check_against_reference, leaf


def tables(sequence, batch, pairs, device):
    angles = torch.rand(sequence, batch, 1, pairs, device=device) * 6.0
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    "shape,pairs,table_batch",
    [((1, 1, 1, 2), 1, 1), ((5, 2, 3, 14), 7, 1), ((7, 3, 2, 40), 17, 3), ((6, 2, 5, 64), 32, 2), ((3, 1, 2, 7), 3, 1)],
    ids=str,
)
def test_rotary(kernels, dtype, shape, pairs, table_batch, interleaved):
    x = leaf(shape, dtype, kernels.device)
    cos, sin = tables(shape[0], table_batch, pairs, kernels.device)
    inputs = [x, cos, sin, interleaved]
    check_against_reference(ops.rotary, ops.rotary, inputs, [torch.randn(shape, device=kernels.device)])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_cut_of_a_packed_projection(kernels, dtype, interleaved):
    packed = leaf((5, 2, 3 * 4 * 16), dtype, kernels.device)
    cos, sin = tables(5, 1, 8, kernels.device)

    def rotated(packed, cos, sin):
        q = packed.split(64, dim=-1)[1].unflatten(-1, (4, 16))
        assert not q.is_contiguous()
        y = ops.rotary(q, cos, sin, interleaved)
        return y.permute(1, 2, 0, 3)  # as attention takes it: the gradient comes back strided

    check_against_reference(rotated, rotated, [packed, cos, sin], [torch.randn(2, 4, 5, 16, device=kernels.device)])


def test_relative_positions_are_all_that_counts(kernels):
    frequency = 10000.0 ** -(torch.arange(8) / 8)
    angles = torch.outer(torch.arange(12.0), frequency)[:, None, None].to(kernels.device)
    q, k = torch.randn(1, 1, 1, 16, device=kernels.device), torch.randn(1, 1, 1, 16, device=kernels.device)
    turn = lambda x: ops.rotary(x.expand(12, 1, 1, 16), angles.cos(), angles.sin())[:, 0, 0]  # noqa: E731
    scores = turn(q) @ turn(k).T
    torch.testing.assert_close(scores[3, 1], scores[9, 7], rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named(kernels):
    x = torch.ones(4, 2, 3, 8, device=kernels.device)
    good = torch.ones(4, 1, 1, 4, device=kernels.device)
    with pytest.raises(ConfigError, match="cos has shape"):
        ops.rotary(x, torch.ones(3, 1, 1, 4), good)
    with pytest.raises(ConfigError, match="sin has shape"):
        ops.rotary(x, good, torch.ones(4, 1, 1, 5))
    with pytest.raises(ConfigError, match="x has shape"):
        ops.rotary(x[0], good, good)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("pairs", [8, 5])
def test_in_place_in_a_packed_projection(kernels, dtype, interleaved, pairs):
    raw = leaf((5, 2, 3 * 4 * 16), dtype, kernels.device)
    cos, sin = tables(5, 1, pairs, kernels.device)

    def out_of_place(packed, cos, sin):
        q, k, v = packed.unflatten(-1, (3, 4, 16)).unbind(2)
        return ops.rotary(q, cos, sin, interleaved), k * 1.0, ops.rotary(v, cos, sin, interleaved)

    packed = raw * 1.0
    view = packed.unflatten(-1, (3, 4, 16))
    for index in (0, 2):
        part = view.select(2, index)
        assert ops.rotary_(part, cos, sin, interleaved).data_ptr() == part.data_ptr()
    want = out_of_place(raw, cos, sin)
    got = packed.unflatten(-1, (3, 4, 16)).unbind(2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    gradient = torch.randn(5, 2, 4, 16, device=kernels.device).to(dtype)
    (a,) = torch.autograd.grad(got, [raw], [gradient] * 3)
    (b,) = torch.autograd.grad(want, [raw], [gradient] * 3)
    assert torch.equal(a, b)
