"""Collectives: values, gradients by conjugacy, exact 16-bit sums, counted bytes, no-ops on a single rank."""

import pytest
import torch

from megalm.config import ParallelConfig
from megalm.parallel import collectives
from megalm.parallel.mesh import Axis, build_mesh
from tests.distributed import run_ranks


def tensors(size, shape, dtype):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]


def plain_operations(size):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        own = tensors(size, (size * 3, 5), torch.float32)[axis.rank]
        own = (own * 10).to(dtype)
        results[dtype] = {
            "all_reduce": collectives.all_reduce(own.clone(), axis),
            "odd": collectives.all_reduce(own[:1, :3].clone(), axis),
            "strided": collectives.all_reduce(own.clone().t(), axis),
            "max": collectives.all_reduce(own.clone(), axis, "max"),
            "gather 0": collectives.all_gather(own, axis),
            "gather 1": collectives.all_gather(own, axis, 1),
            "scatter 0": collectives.reduce_scatter(own, axis),
            "scatter 1": collectives.reduce_scatter(own.t(), axis, 1),
            "all_to_all": collectives.all_to_all(own, axis),
            "broadcast": collectives.broadcast(own.clone(), axis, size - 1),
            "exchange": collectives.exchange([own, own[0]], axis, (axis.rank + 1) % size, (axis.rank - 1) % size),
        }
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_plain_operations(size):
    per_rank = run_ranks(size, plain_operations, size)
    for dtype in per_rank[0]:
        owns = [(t * 10).to(dtype) for t in tensors(size, (size * 3, 5), torch.float32)]
        # 16-bit sums must equal the fp32 sum in rank order, rounded once: exactly.
        exact = dtype != torch.float32
        summed = torch.stack([t.float() if dtype.is_floating_point else t for t in owns]).sum(0).to(dtype)
        for rank, found in enumerate(per_rank):
            ours = found[dtype]

            def same(name, expected, exact=exact, ours=ours):
                torch.testing.assert_close(ours[name], expected, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)

            same("all_reduce", summed)
            same("odd", summed[:1, :3])
            same("strided", summed.t())
            assert torch.equal(ours["max"], torch.stack(owns).amax(0))
            assert torch.equal(ours["gather 0"], torch.cat(owns))
            assert torch.equal(ours["gather 1"], torch.cat(owns, 1))
            same("scatter 0", summed.chunk(size)[rank])
            same("scatter 1", summed.t().chunk(size, 1)[rank])
            assert torch.equal(ours["all_to_all"], torch.cat([t.chunk(size)[rank] for t in owns]))
            assert torch.equal(ours["broadcast"], owns[-1])
            assert torch.equal(ours["exchange"][0], owns[rank - 1])
            assert torch.equal(ours["exchange"][1], owns[rank - 1][0])


def differentiable(size):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    operations = {
        "copy": lambda x: collectives.copy(x, axis),
        "reduce": lambda x: collectives.reduce(x, axis),
        "gather": lambda x: collectives.gather(x, axis, 1),
        "scatter": lambda x: collectives.scatter(x, axis, 1),
        "split": lambda x: collectives.split(x, axis, 1),
        "join": lambda x: collectives.join(x, axis, 1),
    }
    results = {}
    for name, operation in operations.items():
        x = tensors(size, (3, 2 * size), torch.float32)[axis.rank].requires_grad_()
        y = operation(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(100 + axis.rank))
        y.backward(grad)
        results[name] = (x.detach(), y.detach(), grad, x.grad)
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_backward_is_the_transpose_of_forward(size):
    """<y, g> summed over ranks equals <x, gradient of x> summed over ranks, for the linear maps over all ranks
    together."""
    per_rank = run_ranks(size, differentiable, size)
    for name in ("gather", "scatter"):
        forward = sum((rank[name][1].double() * rank[name][2]).sum() for rank in per_rank)
        backward = sum((rank[name][0].double() * rank[name][3]).sum() for rank in per_rank)
        torch.testing.assert_close(forward, backward, rtol=1e-6, atol=1e-5)
    grads = {name: [rank[name][2] for rank in per_rank] for name in per_rank[0]}
    xs = {name: [rank[name][0] for rank in per_rank] for name in per_rank[0]}
    for rank, found in enumerate(per_rank):
        torch.testing.assert_close(found["copy"][1], xs["copy"][rank])
        torch.testing.assert_close(found["copy"][3], sum(grads["copy"]))
        torch.testing.assert_close(found["reduce"][1], sum(xs["reduce"]))
        torch.testing.assert_close(found["reduce"][3], grads["reduce"][rank])
        torch.testing.assert_close(found["split"][1], xs["split"][rank].chunk(size, 1)[rank])
        torch.testing.assert_close(found["split"][3], torch.cat(grads["split"], 1))
        torch.testing.assert_close(found["join"][1], torch.cat(xs["join"], 1))
        torch.testing.assert_close(found["join"][3], grads["join"][rank].chunk(size, 1)[rank])


def test_an_axis_of_one_rank_does_nothing_at_all():
    axis = Axis("tensor")
    x = torch.randn(3, 4, requires_grad=True)
    with collectives.count_bytes() as sent:
        for operation in (collectives.copy, collectives.reduce, collectives.gather, collectives.scatter):
            assert operation(x, axis) is x
        assert collectives.split(x, axis) is x and collectives.join(x, axis) is x
        assert collectives.all_reduce(x, axis) is x and collectives.all_gather(x, axis) is x
        assert collectives.reduce_scatter(x, axis) is x and collectives.all_to_all(x, axis) is x
    assert sent.bytes == {}


def uneven(size):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    own = torch.arange(10) + 100 * axis.rank
    send = [3, 7] if axis.rank == 0 else [10, 0]
    receive = [3, 10] if axis.rank == 0 else [7, 0]
    with collectives.count_bytes() as sent:
        received = collectives.all_to_all(own, axis, send, receive)
    try:
        collectives.reduce_scatter(torch.zeros(3), axis)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return received.tolist(), sent.bytes, refused


def test_uneven_all_to_all_and_refused_scatter():
    (first, sent_first, refused), (second, sent_second, _) = run_ranks(2, uneven, 2)
    assert first == [0, 1, 2, *range(100, 110)] and second == list(range(3, 10))
    assert sent_first == {("all_to_all", "tensor"): 7 * 8} and sent_second == {("all_to_all", "tensor"): 10 * 8}
    assert "cannot be scattered over 2 tensor ranks" in refused
