"""The ring of snapshots: ages, exact restoration, memory known beforehand; fingerprints and the verdict of the probe."""

import random

import numpy as np
import pytest
import torch

from megalm.config import ConfigError
from megalm.guard.probe import reach_verdict
from megalm.guard.replay import History, StepRecord, find_minority, list_differing, take_fingerprint
from megalm.guard.snapshots import SnapshotRing, check_memory, count_held_bytes
from megalm.parallel.slices import Box


def box(*values):
    return Box("w", (len(values),), (0,), torch.tensor(values, dtype=torch.float32))


def filled(lags, until):
    ring, boxes = SnapshotRing(lags), [box(0.0)]
    for step in range(until + 1):
        boxes[0].tensor.fill_(step)
        if ring.due(step):
            ring.capture(step, boxes, {"step": step})
    return ring, boxes


@pytest.mark.parametrize("step", [272, 511, 512, 700, 1000, 1023, 1024])
def test_whatever_the_step_there_is_an_old_enough_state(step):
    ring, _ = filled([16, 64, 256], step)
    ages = [step - snapshot.step for snapshot in ring.slots]
    assert ages == sorted(ages) and 0 <= ages[0] < 16 <= ages[1] < 80 <= ages[2] < 336


def test_early_on_the_first_states_are_kept():
    ring, _ = filled([16, 64, 256], 40)
    assert [s.step for s in ring.slots] == [32, 16, 0]


def test_each_snapshot_holds_the_values_of_its_step():
    ring, boxes = filled([2, 4, 8], 37)
    for slot in range(3):
        snapshot = ring.slots[slot]
        ring.restore(snapshot, boxes)
        assert boxes[0].tensor.item() == snapshot.step == snapshot.state["step"]


def test_restoring_brings_back_random_numbers_and_drops_younger_states():
    ring, boxes = filled([2, 4, 8], 16)
    chosen = ring.choose(14, attempt=1)
    assert chosen.step == 14
    ring.restore(chosen, boxes)
    numbers = torch.rand(3).tolist(), np.random.rand(), random.random()
    ring.restore(chosen, boxes)
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == numbers
    assert [s.step for s in ring.slots if s] == [14, 10]
    assert ring.choose(20, attempt=2).step == ring.choose(20, attempt=9).step == 10
    assert ring.choose(9) is None


def test_memory_does_not_grow():
    ring, boxes = filled([2, 4], 9)
    pointers = {s.tensors[0].data_ptr() for s in ring.slots} | {t[0].data_ptr() for t in ring._spare}
    for step in range(10, 60, 2):
        ring.capture(step, boxes, {})
    assert {s.tensors[0].data_ptr() for s in ring.slots} | {t[0].data_ptr() for t in ring._spare} == pointers
    assert len(pointers) <= 3


def test_a_ring_that_does_not_fit_is_refused_with_the_figures():
    boxes = [Box("w", (10**6,), (0,), torch.zeros(10**6))]
    assert count_held_bytes([16, 64, 256], boxes) == 12 * 10**6
    assert check_memory([16, 64, 256], boxes, local_ranks=1, limit_gb=0.012) == 12 * 10**6
    with pytest.raises(ConfigError) as error:
        check_memory([16, 64, 256], boxes, local_ranks=2, limit_gb=0.009)
    for text in ("0.004 GB", "0.012 GB", "0.009 GB", "snapshot_lags=[16,64]"):
        assert text in str(error.value)


def test_a_fingerprint_sees_every_bit():
    tensor = torch.randn(1000)
    before = take_fingerprint([tensor])
    tensor.view(torch.int32)[777] ^= 1
    assert take_fingerprint([tensor]) != before
    assert take_fingerprint([tensor.bfloat16()]) == take_fingerprint([tensor.bfloat16()])


def test_who_is_odd():
    assert list_differing([5, 6, 7], [5, 9, 7]) == [1]
    assert find_minority([3, 3, 4, 3]) == [2]
    assert find_minority([3, 4]) == [0, 1]


@pytest.mark.parametrize(
    "kind, excess, expected",
    [
        ("transient", 0.01, "data"),
        ("transient", 0.3, "weights"),
        ("transient", float("nan"), "weights"),
        ("transient", None, "unknown"),
        ("shift", None, "weights"),
        ("shift", -0.2, "data"),
        ("nonfinite", 0.0, "nonfinite"),
        ("nonfinite", float("inf"), "weights"),
        ("nonfinite", None, "nonfinite"),
    ],
)
def test_what_the_probe_says(kind, excess, expected):
    assert reach_verdict(kind, excess, 0.1) == expected


def test_history_finds_where_a_step_began():
    history = History(length=4)
    for step in range(10):
        history.add(step, StepRecord(1.0, 1.0, 8 * step, 8 * step + 8))
    assert history.first_position(7) == 56 and history.first_position(2) == 48
    assert history.first_position(11) is None and history.get(3) is None
    assert StepRecord(float("nan"), 1.0, 0, 0).same(float("nan"), 1.0)
