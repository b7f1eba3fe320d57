"""The load of a run's mixtures: what is told of it, and the states that follow it once an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from megalm.architecture.blocks import MixtureSpec
from megalm.architecture.layers import list_trained_layers, name_layer
from megalm.config import ModelConfig
from megalm.model.balance import BalanceLoss

if TYPE_CHECKING:
    from megalm.model.transformer import Transformer

PREFIX = "router/"
"""Names of a mixture's numbers in a step's record begin with this."""


class Balance:
    """Reads the step's sums of every mixture of the model, and moves the states of this rank's.

    The counts are integers of the whole global batch, the same on every rank and layout, so the states are equal bit by bit.
    They move where an update was applied, and nowhere else: not in evaluation, not by recomputation, not for a batch whose
    update was refused; going back brings back what the boxes held.

    b_e = b_e + rate * sign(mean c - c_e)
    Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1
    """

    def __init__(self, model: ModelConfig, chunks: Sequence[Transformer]) -> None:
        self.layers = {
            f"{name_layer(index)}.{sublayer.name}": index
            for index, layer in enumerate(list_trained_layers(model))
            for sublayer in layer.sublayers
            if isinstance(sublayer.block, MixtureSpec)
        }
        self.own = [module for chunk in chunks for module in chunk.modules() if isinstance(module, BalanceLoss)]

    def describe(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Describe numbers for the step's record: of each mixture's layer, and of the worst of them; {} for a dense model.

        max_load: the fullest expert's tokens over the mean; dead: experts without any; entropy: of the mean probability, as a
        share of the even one's.
        """
        found: dict[str, float] = {}
        for name, index in self.layers.items():
            counts, probability = (sums[f"{name}.router.{part}"] for part in ("counts", "probability"))
            found[f"{PREFIX}{index}/max_load"] = float(counts.max() / max(counts.mean(), 1.0 / counts.size))
            found[f"{PREFIX}{index}/dead"] = float((counts == 0).sum())
            found[f"{PREFIX}{index}/entropy"] = _entropy(probability)
        for part, worst in (("max_load", max), ("dead", sum), ("entropy", min)):
            values = [found[f"{PREFIX}{index}/{part}"] for index in self.layers.values()]
            if values:
                found[PREFIX + part] = float(worst(values))
        return found

    @torch.no_grad()
    def update(self, sums: Mapping[str, np.ndarray]) -> None:
        """Move the states of this rank's mixtures by the counts of a global batch whose update was applied."""
        for mixture in self.own:
            counts = sums[f"{mixture.name}.router.counts"]
            if mixture.selection_bias is not None:
                steps = np.sign(counts.mean() - counts) * mixture.spec.balance.bias_rate
                mixture.selection_bias += torch.from_numpy(steps).to(mixture.selection_bias)
            if mixture.load_shares is not None:
                shares = counts / max(counts.sum(), 1.0)
                mixture.load_shares.copy_(torch.from_numpy(shares))


def _entropy(weights: np.ndarray) -> float:
    if weights.size == 1:
        return 1.0
    shares = weights / max(weights.sum(), np.finfo(np.float64).tiny)
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum() / math.log(weights.size))
