import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.backend import use_backend
from megalm.ops.sequence import _JOIN, _PACK
from megalm.parallel.context import number_zigzag_positions
from megalm.parallel.mesh import Axis
from tests.ops.conftest import SANITIZED

layouts = pytest.mark.parametrize("dim, out_dim", [(0, 0), (0, 1), (1, 0), (1, 1)])
orders = pytest.mark.parametrize("zigzag", [False, True], ids=["plain", "zigzag"])


def both(function):
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            results.append(function())
    return results


@layouts
@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("rest", [(), (2, 8)], ids=str)
def test_pack_part_and_join(kernels, dim, out_dim, zigzag, dtype, rest):
    parts, batch = 3, 2
    shape = (12, batch, *rest) if dim == 0 else (batch, 12, *rest)
    x = torch.randint(0, 2 if dtype == torch.bool else 100, shape, device=kernels.device).to(dtype)
    options = {"dim": dim, "out_dim": out_dim, "zigzag": zigzag}
    packed, wanted = both(lambda: ops.sequence_pack(x, parts, **options))
    assert packed.is_contiguous() and torch.equal(packed, wanted)
    for rank in range(parts):
        part, same = both(lambda rank=rank: ops.sequence_part(x, parts, rank, **options))
        assert torch.equal(part, packed[rank]) and torch.equal(same, part)
    back, wanted = both(lambda: ops.sequence_join(packed, dim=out_dim, out_dim=dim, zigzag=zigzag))
    assert torch.equal(back, x) and torch.equal(wanted, x)


def test_parts_are_those_of_context_parallelism(kernels):
    x = torch.arange(2 * 24, device=kernels.device).view(2, 24)
    for rank in range(4):
        axis = Axis("context", 4, rank, tuple(range(4)), None)
        want = x[:, number_zigzag_positions(24, axis)]
        assert torch.equal(ops.sequence_part(x, 4, rank, dim=1, zigzag=True), want)


@layouts
@orders
def test_gradients(kernels, dim, out_dim, zigzag):
    x = torch.randn(8, 8, 3, device=kernels.device, requires_grad=True)
    options = {"dim": dim, "out_dim": out_dim, "zigzag": zigzag}
    weights = torch.randn(ops.sequence_pack(x, 2, **options).shape, device=kernels.device)

    def run():
        packed = ops.sequence_pack(x, 2, **options)
        joined = ops.sequence_join(packed * weights, **options)
        total = (joined.sin() * torch.arange(joined.numel(), device=x.device).view_as(joined)).sum()
        return torch.autograd.grad(total, [x])[0]

    torch.testing.assert_close(*both(run))


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 7), (3, 33), (8, 4, 64), (5, 1000)], ids=str)
def test_sum_parts(kernels, dtype, shape):
    x = torch.randn(shape, device=kernels.device).to(dtype)
    got = ops.sum_parts(x)
    total = torch.zeros(shape[1:], device=kernels.device)
    for part in x:
        total += part.float()
    assert torch.equal(got, total.to(dtype))


def test_empty(kernels):
    x = torch.zeros(0, 2, 3, device=kernels.device)
    assert ops.sequence_pack(x, 2).shape == (2, 0, 2, 3)
    assert ops.sequence_join(torch.zeros(2, 4, 0, 3, device=kernels.device)).shape == (8, 0, 3)
    assert ops.sequence_part(x, 2, 1, out_dim=1).shape == (2, 0, 3)
    assert ops.sum_parts(torch.zeros(3, 0, device=kernels.device)).shape == (0,)
    assert ops.sum_parts(torch.zeros(0, 3, device=kernels.device)).tolist() == [0.0] * 3


def test_strided_input(kernels):
    x = torch.randn(6, 4, 5, device=kernels.device).transpose(0, 1)
    assert torch.equal(ops.sequence_pack(x, 2), x.reshape(2, 2, 6, 5))
    assert torch.equal(ops.sum_parts(x), x[0] + x[1] + x[2] + x[3])


@pytest.mark.skipif(bool(SANITIZED), reason="no kernels of its own to look at")
@pytest.mark.parametrize("zigzag", [False, True])
def test_opcheck(kernels, zigzag):
    x = torch.randn(8, 3, 2, requires_grad=True)
    torch.library.opcheck(_PACK.op, (x, 2, 0, 1, zigzag))
    torch.library.opcheck(_JOIN.op, (torch.randn(2, 4, 3, requires_grad=True), 2, 0, 1, zigzag))


def test_bad_arguments_are_named(kernels):
    x = torch.zeros(6, 2, 3)
    for call, message in [
        (lambda: ops.sequence_pack(x[0, 0], 2), "x has shape"),
        (lambda: ops.sequence_pack(x, 4), "a sequence of 6 cannot be cut into 4"),
        (lambda: ops.sequence_pack(x, 2, zigzag=True), "cannot be cut into 4"),
        (lambda: ops.sequence_pack(x, 0), "parts=0"),
        (lambda: ops.sequence_pack(x, 2, dim=2), "dim=2"),
        (lambda: ops.sequence_part(x, 2, 2), "part=2"),
        (lambda: ops.sequence_join(x[0]), "x has shape"),
        (lambda: ops.sequence_join(torch.zeros(2, 3, 1), zigzag=True), "cannot be cut into 4"),
        (lambda: ops.sum_parts(torch.tensor(1.0)), "scalar"),
        (lambda: ops.sum_parts(x.double()), "x is torch.float64"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()
