"""Errors and intervals against what simulation says."""

import math
import random

import pytest

from megalm.evaluate.statistics import compare_paired, estimate_mean, estimate_ratio, wilson_interval


def test_the_error_of_a_mean_is_the_sample_deviation_over_the_root_of_n():
    value, error = estimate_mean([1.0, 0.0, 0.0, 1.0])
    assert value == 0.5 and error == pytest.approx(math.sqrt((4 * 0.25) / 3 / 4))
    assert estimate_mean([1.0]).error is None


def test_the_error_of_a_ratio_is_its_spread():
    rng = random.Random(1)
    found = []
    for _ in range(2000):
        below = [rng.uniform(1, 3) for _ in range(40)]
        above = [2 * b + rng.gauss(0, 1) for b in below]
        found.append(estimate_ratio(above, below))
    mean = sum(f.value for f in found) / len(found)
    spread = math.sqrt(sum((f.value - mean) ** 2 for f in found) / (len(found) - 1))
    assert sum(f.error for f in found) / len(found) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_wilsons_interval_covers_what_it_says(share):
    rng = random.Random(2)
    hits = 0
    for _ in range(2000):
        low, high = wilson_interval(sum(rng.random() < share for _ in range(60)), 60)
        hits += low <= share <= high
    assert 0.92 < hits / 2000 < 0.98


def test_a_paired_test_sees_what_two_errors_do_not():
    first = [float(i % 2) for i in range(200)]
    second = [1.0 if i % 20 == 0 else value for i, value in enumerate(first)]
    found = compare_paired(first, second)
    assert found.difference == pytest.approx(0.05) and found.p_value == pytest.approx(2 / 2**10)
    assert compare_paired(first, first).p_value == 1.0
    assert compare_paired([0.5, 1.5, 2.5], [0.6, 1.7, 2.6]).p_value < 0.01
