"""Dropout: masks that agree where activations are replicated and differ where they are sharded."""

import torch
import torch.utils.checkpoint

from megalm.config import ParallelConfig
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.parallel.random import apply_dropout, seed_ranks
from tests.distributed import run_ranks


def masks():
    mesh = build_mesh(ParallelConfig(tensor=2))
    seed_ranks(5, mesh)
    ones = torch.ones(64)
    drawn = [
        apply_dropout(ones, 0.5, True, mesh.tensor, sharded=False),
        apply_dropout(ones, 0.5, True, mesh.tensor, sharded=True),
        apply_dropout(ones, 0.5, True, mesh.tensor, sharded=True),
        apply_dropout(ones, 0.5, True, mesh.tensor, sharded=False),
    ]
    seed_ranks(5, mesh)
    again = [apply_dropout(ones, 0.5, True, mesh.tensor, sharded=s) for s in (False, True, True, False)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    return drawn


def test_masks_agree_over_tensor_and_differ_over_data():
    per_rank = run_ranks(4, masks)
    for first, second in ((0, 1), (2, 3)):  # ranks of one tensor group
        same = [torch.equal(a, b) for a, b in zip(per_rank[first], per_rank[second], strict=True)]
        assert same == [True, False, False, True]
    assert not any(torch.equal(a, b) for a, b in zip(per_rank[0], per_rank[2], strict=True))
    assert not torch.equal(per_rank[0][1], per_rank[0][2])  # and from one call to the next
    for drawn in per_rank:
        assert all(set(mask.tolist()) == {0.0, 2.0} for mask in drawn)


def recomputed():
    mesh = build_mesh(ParallelConfig(tensor=2))
    seed_ranks(1, mesh)
    x = torch.ones(256, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda t: apply_dropout(t * 3, 0.5, True, mesh.tensor, sharded=True).square(), x, use_reentrant=False
    )
    torch.rand(10)
    y.sum().backward()
    # d/dx (m 3 x)^2 = 18 m^2 at 1, and y = 9 m^2: equal masks in both passes give grad = 2 y.
    return torch.equal(x.grad, 2 * y.detach())


def test_recomputation_draws_the_same_mask():
    assert all(run_ranks(2, recomputed))


def test_no_dropout_is_no_operation():
    x, axis = torch.randn(5), Mesh.single().tensor
    assert (
        apply_dropout(x, 0.0, True, axis, sharded=True) is x and apply_dropout(x, 0.5, False, axis, sharded=False) is x
    )


def sharded_and_whole():
    mesh = build_mesh(ParallelConfig(tensor=2))
    x, residual = torch.arange(1.0, 6 * 3 * 8 + 1).view(6, 3, 8), torch.full((6, 3, 8), 0.25)
    seed_ranks(7, mesh)
    whole = apply_dropout(x, 0.5, True, mesh.tensor, sharded=False, residual=residual)
    seed_ranks(7, mesh)
    own = slice(3 * mesh.tensor.rank, 3 * mesh.tensor.rank + 3)
    part = apply_dropout(x[own], 0.5, True, mesh.tensor, sharded=True, residual=residual[own])
    return torch.equal(part, whole[own]), whole


def test_a_shard_has_its_part_of_the_whole_mask():
    for equal, whole in run_ranks(2, sharded_and_whole):
        assert equal
        assert 0.25 < float((whole == 0.25).float().mean()) < 0.75
