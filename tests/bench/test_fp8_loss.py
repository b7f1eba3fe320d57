"""The verdict of `tools.bench fp8_loss`: within the seeds' spread, and below a quarter of a percent."""

import pytest

from tools.bench.train.fp8_loss import judge

WIDE = [3.00, 3.02, 2.98]


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ([3.001, 3.021, 2.981], True),
        ([3.019, 3.039, 2.999], False),  # within the spread of 0.02, but 0.6%
        ([3.03, 3.05, 3.01], False),
        ([2.995, 3.015, 2.975], True),
    ],
)
def test_the_verdict(losses, holds):
    found = judge(losses, WIDE)
    assert found.holds == holds and found.spread == pytest.approx(0.02)
    assert found.difference == pytest.approx(losses[0] - WIDE[0]) and found.share == pytest.approx(found.difference / 3)


def test_a_large_spread_does_not_excuse_a_large_difference():
    assert not judge([3.3, 2.9, 3.1], [3.0, 2.6, 2.8]).holds
