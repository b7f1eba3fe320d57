"""Reinforcement: texts that the policy wrote are made likelier or less likely, as their rewards say.

All of GRPO, Dr. GRPO, DAPO, GSPO, CISPO and RLOO are one formula with other words for its parts. With log p of a token now, log q
where it was drawn, A its advantage, and w what it counts:

    loss = sum w L / N          w, N     tokens      1,        all tokens of the step
                                         sequences   1/|y|,    all texts of the step
                                         budget      1/budget, all texts of the step
    L = -min(r A, clip(r) A)    r        token       p / q
                                         sequence    exp(mean over y of log p - log q)
                                         trajectory  exp(sum over y of log p - log q)
    L = -min(r, 1 + high) A log p with r held constant: truncated

A ratio of a whole text has one derivative for all its tokens; it is computed outside autograd, so that a text may be cut over
context ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.config.policy import PolicyConfig
from megalm.data.batch import Batch, declare_dims
from megalm.model.head import Head
from megalm.objectives.objective import Objective, Outcome
from megalm.parallel.collectives import all_reduce
from megalm.parallel.mesh import Axis


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Prompts with what was written after them, packed into rows; `loss_mask` is 1 where a written token is predicted."""

    shares: Tensor | None = declare_dims("batch", "sequence")
    """fp32: 1 / tokens of the text, where `loss_mask` is 1."""
    texts: Tensor | None = declare_dims("batch", "sequence")
    """int64: number of the text, within its row, that each position is of."""
    advantages: Tensor | None = declare_dims("batch", "sequence")
    """fp32: how much better than expected the token's text was."""
    drawn: Tensor | None = declare_dims("batch", "sequence")
    """fp32: log-probability of the written token where it was drawn."""
    reference: Tensor | None = declare_dims("batch", "sequence")
    """fp32: log-probability of it by the reference."""


class Policy(Objective):
    """The surrogate loss whose gradient is the policy's.

    Args:
        budget: most tokens of a text; temperature: that the tokens were drawn at.

    Sums: `policy/mismatch`, mean |log p - log q|, rounding alone in the first update after a rollout; `policy/ratio`, mean p / q;
        `policy/clipped`, share without gradient; `policy/kl`, k3 to the reference. Means over tokens, or over texts where the
        loss is one.
    """

    judged = False

    def __init__(self, settings: PolicyConfig, budget: int, temperature: float) -> None:
        self.settings, self.budget = settings, budget
        self.temperature = temperature or 1.0
        self.divisor = "tokens" if settings.aggregate == "tokens" else "texts"
        self.sums = {"loss": 1, "tokens": 1, "policy/mismatch": 1, "policy/ratio": 1, "policy/clipped": 1}
        if self.divisor == "texts":
            self.sums["texts"] = 1
        if settings.kl:
            self.sums["policy/kl"] = 1

    def expect(self, sequences: int, seq_length: int) -> float:
        return float(sequences if self.divisor == "texts" else sequences * self.budget)

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        assert isinstance(batch, PolicyBatch) and batch.loss_mask is not None and batch.shares is not None
        assert batch.drawn is not None and batch.advantages is not None
        settings, mask, shares = self.settings, batch.loss_mask.t(), batch.shares.t()
        scores = head.log_probabilities(hidden, batch.labels.t(), self.temperature)
        drawn, advantages = batch.drawn.t(), batch.advantages.t()
        difference = torch.where(mask > 0, scores - drawn, 0.0)
        each = shares if self.divisor == "texts" else mask
        weights = {"tokens": mask, "sequences": shares, "budget": mask / self.budget}[settings.aggregate]
        if settings.ratio in ("sequence", "trajectory"):
            term, value, clipped = self._whole_texts(scores, difference.detach(), advantages, batch, head.context)
            if settings.ratio == "trajectory":  # a text's loss counts once; its derivative is every token's
                total, loss = (mask * term).sum(), (shares * value).sum()
            else:
                total, loss = (weights * term).sum(), (weights * value).sum()
        else:
            term, clipped = self._tokens(scores, difference, advantages)
            total = (weights * term).sum()
            loss = total.detach()
        ratio = difference.exp()
        sums = {
            "tokens": mask.sum(),
            "policy/mismatch": (each * difference.detach().abs()).sum(),
            "policy/ratio": (each * ratio.detach()).sum(),
            "policy/clipped": (each * clipped).sum(),
        }
        if self.divisor == "texts":
            sums["texts"] = shares.sum()
        if settings.kl:
            assert batch.reference is not None
            from_reference = torch.where(mask > 0, scores - batch.reference.t(), 0.0)
            penalty = settings.kl * (weights * estimate_kl(from_reference, ratio, settings.kl_form)).sum()
            total, loss = total + penalty, loss + penalty.detach()
            sums["policy/kl"] = (each * estimate_kl(from_reference.detach(), ratio.detach(), "k3")).sum()
        return Outcome(total, {"loss": loss, **sums})

    def _tokens(self, scores: Tensor, difference: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """(L of each token, whether it has no gradient). Shapes: [S, B] each"""
        settings, ratio = self.settings, difference.exp()
        if settings.ratio == "truncated":
            limited = ratio.detach().clamp_max(1 + settings.clip_high)
            return -limited * advantages * scores, (ratio.detach() > 1 + settings.clip_high).float()
        free = -ratio * advantages
        limited = -ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
        term, clipped = torch.maximum(free, limited), limited > free
        if settings.dual_clip:
            most = -settings.dual_clip * advantages
            over = (advantages < 0) & (term > most)
            term, clipped = torch.where(over, most, term), clipped | over
        return term, clipped.float()

    def _whole_texts(
        self, scores: Tensor, difference: Tensor, advantages: Tensor, batch: PolicyBatch, context: Axis
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a term with L's gradient, L, whether it has none), at every token of a text alike. Shapes: [S, B] each"""
        assert batch.texts is not None and batch.loss_mask is not None and batch.shares is not None
        settings, low = self.settings, 1 - self.settings.clip_low
        counted = batch.loss_mask if settings.ratio == "trajectory" else batch.shares
        ratio = sum_texts(counted * difference.t(), batch.texts, context).exp().t()
        free = -ratio * advantages
        limited = -ratio.clamp(low, 1 + settings.clip_high) * advantages
        clipped = limited > free
        term = torch.where(clipped, 0.0, free) * scores
        return term, torch.maximum(free, limited), clipped.float()


def sum_texts(values: Tensor, texts: Tensor, context: Axis) -> Tensor:
    """At each position the sum of its whole text's values.

    Shapes: values fp32, texts int64 [B, S/c] -> [B, S/c]
    Comm:   all-reduce of [B, S] over the context axis
    """
    room = values.shape[1] * context.size  # no row has more texts than positions
    sums = values.new_zeros(values.shape[0], room).scatter_add_(1, texts, values)
    return all_reduce(sums, context).gather(1, texts)


def estimate_kl(difference: Tensor, ratio: Tensor, form: str) -> Tensor:
    """An estimate of KL(p, p_ref) at a token that p drew, from log p - log p_ref; see `PolicyConfig.kl_form`.

    ratio: p / q of the token, through which k3_weighted is differentiated, too.
    Source: Schulman 2020, Approximating KL Divergence; k3_weighted: DeepSeek-V3.2 (arXiv:2512.02556)
    """
    if form == "k1":
        return difference
    if form == "k2":
        return difference.square() / 2
    k3 = torch.expm1(-difference) + difference
    if form == "k3_weighted":
        return ratio * k3
    if form == "k3_k2":
        k2 = difference.square() / 2
        return k3.detach() + k2 - k2.detach()
    return k3
