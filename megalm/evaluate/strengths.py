"""How strong models are from who was preferred to whom: Bradley-Terry by logistic regression, with style beside it.

log odds that `left` wins = strength[left] - strength[right] + sum_k coefficient_k * style_k(left, right)

Style columns are differences that a reader may reward whatever is said: length, headings, bold, lists, each over its sum. With
them in the fit, strengths are those of equal style.

Source: Bradley and Terry 1952; Chiang et al. 2024 (arXiv:2403.04132); style columns as Arena's
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STYLE = {
    "length": lambda text: len(text.split()),
    "headings": lambda text: len(re.findall(r"(?m)^#{1,6} ", text)),
    "bold": lambda text: len(re.findall(r"\*\*[^*\n]+\*\*", text)),
    "lists": lambda text: len(re.findall(r"(?m)^\s*(?:[-*+]|\d+\.) ", text)),
}
"""What is counted of an answer."""
RIDGE = 1e-3
"""Pull of every coefficient towards 0, in votes: without it a model that never lost would have no finite strength."""


@dataclass(frozen=True)
class Vote:
    """One comparison: `outcome` 1.0 left is better, 0.0 right is, 0.5 neither."""

    left: str
    right: str
    outcome: float
    left_text: str = ""
    right_text: str = ""


@dataclass(frozen=True)
class Strengths:
    """Natural logarithms of odds; their mean over models is 0."""

    models: list[str]
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """95% interval by bootstrap over votes."""
    style: dict[str, float]
    """Coefficient of each style column; {} where style was not controlled for."""


def fit_strengths(votes: Sequence[Vote], *, style: bool = False, bootstrap: int = 1000, seed: int = 0) -> Strengths:
    """Errors: ValueError without votes"""
    if not votes:
        raise ValueError("there are no votes")
    models = sorted({vote.left for vote in votes} | {vote.right for vote in votes})
    columns = {model: number for number, model in enumerate(models)}
    rows = np.zeros((len(votes), len(models) + (len(STYLE) if style else 0)))
    for number, vote in enumerate(votes):
        rows[number, columns[vote.left]] += 1
        rows[number, columns[vote.right]] -= 1
        if style:
            rows[number, len(models) :] = [
                _difference(count(vote.left_text), count(vote.right_text)) for count in STYLE.values()
            ]
    outcomes = np.array([vote.outcome for vote in votes])
    weights = np.ones(len(votes))
    best = _fit(rows, outcomes, weights)
    rng = np.random.default_rng(seed)
    drawn = [
        _fit(rows, outcomes, rng.multinomial(len(votes), weights / len(votes)).astype(float), best)[: len(models)]
        for _ in range(bootstrap)
    ]
    spread = np.array(drawn) if drawn else best[None, : len(models)]
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    named = dict(zip(STYLE, best[len(models) :].tolist(), strict=True)) if style else {}
    return Strengths(models, best[: len(models)], low, high, named)


def _difference(left: int, right: int) -> float:
    return (left - right) / (left + right) if left + right else 0.0


def _fit(rows: np.ndarray, outcomes: np.ndarray, weights: np.ndarray, begin: np.ndarray | None = None) -> np.ndarray:
    """Newton's method on the weighted logistic loss with a small ridge; strengths are centred by it."""
    point = np.zeros(rows.shape[1]) if begin is None else begin.copy()
    for _ in range(50):
        chance = 1 / (1 + np.exp(-rows @ point))
        slope = rows.T @ (weights * (outcomes - chance)) - RIDGE * point
        curve = (rows * (weights * chance * (1 - chance))[:, None]).T @ rows + RIDGE * np.eye(len(point))
        step = np.linalg.solve(curve, slope)
        point += step / max(1.0, float(np.abs(step).max()))  # no step of more than e-fold odds
        if np.abs(step).max() < 1e-9:
            break
    return point
