"""A reward model: one number for an answer, read at its last target, higher for the better one of a pair."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.config.objective import RewardConfig
from megalm.data.batch import Batch
from megalm.data.pair_batch import PairBatch
from megalm.model.head import Head
from megalm.objectives.objective import Objective, Outcome
from megalm.objectives.preference import sum_answers

BINS = 10
"""Of the probability that the likelier answer is the better one, from one half to one."""


class Reward(Objective):
    """Bradley-Terry: -logsigmoid(r chosen - r rejected - margin), summed over pairs, and what keeps rewards around 0.

    Watched, as means over the step's pairs: `reward/accuracy`, `reward/margin`, `reward/chosen`, `reward/rejected`;
    `reward/calibration`, the mean distance over bins between how sure it is and how often it is right, weighted by the bins'
    pairs; `reward/length_correlation`, of an answer's reward with its number of targets, over both answers of all pairs.

    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; with margins Touvron et al. 2023 (arXiv:2307.09288), eq. 2
    """

    divisor = "pairs"
    parts = frozenset({"bins", "moments"})

    def __init__(self, settings: RewardConfig) -> None:
        self.settings = settings
        watched = ("accuracy", "margin", "chosen", "rejected")
        self.sums = dict.fromkeys(["loss", "tokens", "pairs", *(f"reward/{name}" for name in watched)], 1)
        self.sums |= {"bins": 3 * BINS, "moments": 5}

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        assert isinstance(batch, PairBatch) and batch.counted is not None and batch.margins is not None
        assert batch.ends is not None and batch.loss_mask is not None
        rewards = sum_answers(head.values(hidden) * batch.ends.t(), batch, head)
        better, worse = rewards.unbind(-1)
        losses = -F.logsigmoid(better - worse - batch.margins.double())
        losses = losses + self.settings.centering * (better + worse).square()
        total = (losses * batch.counted).sum()
        with torch.no_grad():
            lengths = sum_answers((batch.loss_mask.t() > 0).double(), batch, head)
            sums = self._watch(rewards.detach(), lengths, batch.counted)
        sums |= {"loss": total.detach(), "pairs": batch.counted.sum()}
        # Every context rank knows the whole pair, and reports its share of it.
        shared = {name: value / head.context.size for name, value in sums.items()}
        return Outcome(total.float(), {**shared, "tokens": (batch.loss_mask > 0).sum().double()})

    @staticmethod
    def _watch(rewards: Tensor, lengths: Tensor, counted: Tensor) -> dict[str, Tensor]:
        better, worse = rewards.unbind(-1)
        gap, right = better - worse, (better > worse).double()
        values = {"accuracy": right, "margin": gap, "chosen": better, "rejected": worse}
        sure = torch.sigmoid(gap.abs())
        bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1).flatten()
        kept = [(value * counted).flatten() for value in (torch.ones_like(sure), sure, right)]
        zero = torch.zeros(BINS, dtype=torch.float64, device=rewards.device)
        x, y = rewards * counted[..., None], lengths * counted[..., None]
        return {
            **{f"reward/{name}": (value * counted).sum() for name, value in values.items()},
            "bins": torch.cat([zero.index_add(0, bins, value) for value in kept]),
            "moments": torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]),
        }

    def expect(self, sequences: int, seq_length: int) -> float:
        """At least a pair a row."""
        return float(sequences)

    def derive(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The expected calibration error, and Pearson's correlation where rewards and lengths vary."""
        pairs = float(sums["pairs"].sum())
        if not pairs:
            return {}
        _, sure, right = sums["bins"].reshape(3, BINS)
        found = {"reward/calibration": float(np.abs(sure - right).sum() / pairs)}
        x, y, xx, yy, xy = sums["moments"].tolist()
        spread = (xx - x * x / (2 * pairs)) * (yy - y * y / (2 * pairs))
        if spread > 0:
            found["reward/length_correlation"] = (xy - x * y / (2 * pairs)) / spread**0.5
        return found
