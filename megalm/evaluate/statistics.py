"""Means with their standard errors, ratios, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure and its standard error; None where one item says nothing of it."""

    value: float
    error: float | None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "stderr": self.error}


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Mean, and sample standard deviation / sqrt(n)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def estimate_ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """sum(above) / sum(below); its error to first order, from each item's above - ratio * below."""
    total = math.fsum(below)
    ratio = math.fsum(above) / total if total else math.nan
    count = len(above)
    if count < 2 or not total:
        return Estimate(ratio, None)
    rest = math.fsum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True)) / (count - 1)
    return Estimate(ratio, math.sqrt(rest * count) / total)


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), which stays inside [0, 1]. (0, 1) for none."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    below = 1 + z * z / count
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


class Paired(NamedTuple):
    """One model against another on the same items."""

    difference: float
    error: float | None
    p_value: float
    """Chance of a difference at least as large if both were alike: of right and wrong answers the exact sign test (McNemar),
    else normal."""


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """second - first, item by item. Errors: ValueError for other numbers of items"""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    difference, error = estimate_mean(differences)
    if set(first) | set(second) <= {0.0, 1.0}:
        better, worse = differences.count(1.0), differences.count(-1.0)
        return Paired(difference, error, _sign_test(better, worse))
    if not error:
        return Paired(difference, error, 1.0 if not difference else 0.0)
    return Paired(difference, error, math.erfc(abs(difference / error) / math.sqrt(2)))


def _sign_test(better: int, worse: int) -> float:
    count, least = better + worse, min(better, worse)
    if not count:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**count)
