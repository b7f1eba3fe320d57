"""The pool of gloo workers itself."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks


def total(scale):
    tensor = torch.full((3,), float(dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return tensor * scale, dist.get_rank()


def broken(rank):
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def killed(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def test_results_come_back_in_rank_order_for_several_world_sizes():
    for world_size, expected in ((2, 3.0), (4, 10.0), (3, 6.0)):
        results = run_ranks(world_size, total, 2.0)
        assert [rank for _, rank in results] == list(range(world_size))
        assert all(torch.equal(value, torch.full((3,), 2 * expected)) for value, _ in results)


def test_a_failing_or_dying_rank_is_reported_and_the_pool_recovers():
    with pytest.raises(RankError, match="planted"):
        run_ranks(2, broken, 1)
    with pytest.raises(RankError, match="died with exit code 7"):
        run_ranks(2, killed, 0)
    assert run_ranks(2, total, 1.0)[0][0][0] == 3.0
