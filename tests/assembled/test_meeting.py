"""Ranks that another launcher starts: they meet, or say in one sentence, with status 2, what is in the way."""

import socket

import pytest

from tests.assembled.runs import train

SHORT = ["train.steps=2", "resilience.timeout_minutes=0.05"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("rank", "said"), [("0", "only 1 of 2 ranks came"), ("1", "is rank 0 started on that node")])
def test_a_rank_that_stays_alone_does_not_wait_longer_than_the_limit(rank, said, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    run = train(tmp_path, *SHORT, ranks=2, environment={"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, **place})
    assert said in run.ended_well(2).errors


def test_a_port_that_is_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
        assert (
            f"MASTER_PORT={port}: another program listens"
            in train(tmp_path, *SHORT, environment=place).ended_well(2).errors
        )


def test_a_host_that_nobody_knows_is_named(tmp_path):
    place = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "1"}
    assert "MASTER_ADDR=no-such-host.invalid" in train(tmp_path, *SHORT, environment=place).ended_well(2).errors
