"""A small dose of `python -m tools.bench fuzz_data`, and that it would notice."""

import random

import pytest

from megalm.data.formats import mds
from tools.bench.data.fuzz_data import READERS, _work, damage


@pytest.mark.parametrize("reader", READERS)
def test_damage_gives_a_message_and_nothing_else(reader):
    _, outcomes, failures = _work((reader, 7, 1500))
    assert not failures and outcomes["refused"] > 300 and outcomes["read"] > 20


def test_a_reader_that_breaks_is_noticed(monkeypatch):
    def broken(encoding, data):
        raise KeyError(encoding)

    monkeypatch.setattr(mds, "decode_value", broken)
    _, outcomes, failures = _work(("shards", 7, 50))
    assert outcomes["failed"] and "KeyError" in failures[0]


def test_damage_is_the_same_for_the_same_seed():
    assert damage(b"x" * 50, random.Random(3)) == damage(b"x" * 50, random.Random(3)) != b"x" * 50
