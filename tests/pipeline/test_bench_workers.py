"""Worlds of local ranks for benchmarks: values come in rounds; a rank that fails ends its world with its traceback."""

import os

import pytest
import torch
import torch.distributed as dist

from tools.bench._workers import run_world


def rounds(count):
    for i in range(count):
        total = torch.tensor([float(i + dist.get_rank())])
        dist.all_reduce(total)
        yield dist.get_rank(), total.item()


def alone():
    yield dist.is_initialized()


def broken(way):
    yield "first"
    if dist.get_rank() == 1:
        if way == "raise":
            raise ValueError("planted")
        os._exit(3)
    dist.barrier()
    yield "never"


def test_values_come_in_rank_order_round_by_round():
    seen = []
    run_world(2, rounds, 3, receive=seen.append)
    assert seen == [[(0, 1.0), (1, 1.0)], [(0, 3.0), (1, 3.0)], [(0, 5.0), (1, 5.0)]]
    run_world(1, alone, receive=seen.append)
    assert seen[-1] == [False]


@pytest.mark.parametrize(("way", "message"), [("raise", "ValueError: planted"), ("exit", "ended without an answer")])
def test_a_rank_that_fails_is_reported(way, message):
    seen = []
    with pytest.raises(RuntimeError, match=message):
        run_world(2, broken, way, receive=seen.append)
    assert seen == [["first", "first"]]
