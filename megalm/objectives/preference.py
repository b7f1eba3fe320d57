"""Preferences: of two answers to one prompt the better one is to become likelier than the worse one.

    lr    = logp(answer) - reference(answer)            of whole answers; rewards are beta lr
    delta = lr of the chosen answer - lr of the rejected one

Both answers of a pair lie in one row (`megalm.data.pairs`), whose positions context ranks may share; all else is arithmetic on
a few numbers for each pair. The loss is the sum over the pairs of the step, divided by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.config.objective import PreferenceConfig
from megalm.data.batch import Batch
from megalm.data.pair_batch import PairBatch
from megalm.model.head import Head
from megalm.objectives.objective import Objective, Outcome
from megalm.parallel import collectives


@dataclass(frozen=True)
class Answers:
    """What a model makes of the answers of a micro-batch's rows.

    Shapes: log_probability, tokens fp64 [B, P, 2], the chosen answer first
    """

    log_probability: Tensor
    """Of each answer, the sum over its targets."""
    tokens: Tensor
    """Targets of each answer, by weight; 0 where there is none."""

    @property
    def mean(self) -> Tensor:
        """Log-probability of each answer's target, on average."""
        return self.log_probability / self.tokens.clamp(min=1.0)


def sum_answers(values: Tensor, batch: PairBatch, head: Head) -> Tensor:
    """Sums of each position's value over the answers. Gradients flow back to this rank's own positions.

    Shapes: values [S/c, B] -> fp64 [B, P, 2]
    Comm:   forward all-reduce over the context axis of 2 numbers a pair
    """
    assert batch.answers is not None and batch.counted is not None
    rows, width = len(batch.answers), 2 * batch.counted.shape[1] + 1
    place = batch.answers.t() + width * torch.arange(rows, device=values.device)
    zero = torch.zeros(rows * width, dtype=torch.float64, device=values.device)
    sums = collectives.reduce(zero.index_add(0, place.flatten(), values.double().flatten()), head.context)
    return sums.view(rows, width)[:, :-1].unflatten(1, (-1, 2))


def score_answers(head: Head, hidden: Tensor, batch: PairBatch) -> Answers:
    """Shapes: hidden [S/t or S, B, H]"""
    assert batch.loss_mask is not None
    mask = batch.loss_mask.t()
    scores = head.log_probabilities(hidden, batch.labels.t()) * mask
    return Answers(sum_answers(scores, batch, head), sum_answers(mask, batch, head))


@dataclass(frozen=True)
class Compared:
    """Pairs, ready for a loss. Shapes: fp64 [B, P] each; `ratio`, `mean_ratio` and `mean` [B, P, 2], the chosen answer first"""

    ratio: Tensor
    """Log-probability, less the reference's."""
    mean_ratio: Tensor
    """The same divided by each answer's own number of targets."""
    mean: Tensor
    """Log-probability of a target, on average."""
    margin: Tensor

    @property
    def delta(self) -> Tensor:
        return _gap(self.ratio)


Loss = Callable[[Compared, PreferenceConfig], Tensor]


def _gap(both: Tensor) -> Tensor:
    return both[..., 0] - both[..., 1]


def _sigmoid(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; with a margin as in Llama 2 (arXiv:2307.09288, eq. 2)."""
    return -F.logsigmoid(settings.beta * pairs.delta - pairs.margin)


def _conservative(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """A share of the judgements is taken to be wrong: Mitchell 2023, A note on DPO with noisy preferences."""
    z, e = settings.beta * pairs.delta - pairs.margin, settings.label_smoothing
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def _robust(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """The same, unbiased under that noise: Chowdhury et al. 2024 (arXiv:2403.00409), eq. 11."""
    z, e = settings.beta * pairs.delta - pairs.margin, settings.label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def _hinge(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """Zhao et al. 2023 (arXiv:2305.10425), with the reference of DPO."""
    return F.relu(1 + pairs.margin - settings.beta * pairs.delta)


def _ipo(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """Azar et al. 2023 (arXiv:2310.12036), eq. 17, of the means over each answer's tokens."""
    return (_gap(pairs.mean_ratio) - 1 / (2 * settings.beta)).square()


def _sigmoid_norm(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """DPO of the means over each answer's tokens."""
    return -F.logsigmoid(settings.beta * _gap(pairs.mean_ratio) - pairs.margin)


def _apo_zero(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """Each answer held against its own reference: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7."""
    rewards = torch.sigmoid(settings.beta * pairs.ratio)
    return 1 - _gap(rewards)


def _simpo(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """No reference: Meng et al. 2024 (arXiv:2405.14734), eq. 6."""
    return -F.logsigmoid(settings.beta * _gap(pairs.mean) - settings.target_margin - pairs.margin)


def _orpo(pairs: Compared, settings: PreferenceConfig) -> Tensor:
    """No reference; the chosen answer is learned beside it: Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7."""
    odds = _gap(pairs.mean) - _gap(torch.log1p(-torch.exp(pairs.mean.clamp(max=-1e-7))))
    return -pairs.mean[..., 0] - settings.beta * F.logsigmoid(odds)


LOSSES: dict[str, Loss] = {
    "sigmoid": _sigmoid,
    "conservative": _conservative,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "apo_zero": _apo_zero,
    "simpo": _simpo,
    "orpo": _orpo,
}


class Preference(Objective):
    """Sum of a loss over this micro-batch's pairs, and what is to be watched of them, each as a mean over the step's pairs.

    `reward/chosen`, `reward/rejected`, `reward/margin` are beta times the log-ratios (of the means over tokens where the loss
    is of these; without a reference of the log-probabilities themselves); `reward/accuracy` the share of pairs whose margin is
    above 0; `preference/kl` the mean over answers of reference - logp: in expectation the divergence of the reference from the
    model, if the answers are the reference's own.
    """

    divisor = "pairs"

    def __init__(self, settings: PreferenceConfig) -> None:
        self.settings, self.loss = settings, LOSSES[settings.loss]
        watched = ["reward/chosen", "reward/rejected", "reward/margin", "reward/accuracy"]
        watched += ["preference/logp_chosen", "preference/logp_rejected", "preference/longer_chosen"]
        watched += ["preference/kl"] if settings.needs_reference else []
        watched += ["preference/sft_loss"] if settings.sft_weight else []
        self.sums = dict.fromkeys(["loss", "tokens", "pairs", *watched], 1)

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        assert isinstance(batch, PairBatch) and batch.counted is not None and batch.margins is not None
        answers = score_answers(head, hidden, batch)
        reference = torch.zeros_like(answers.log_probability)
        if self.settings.needs_reference:
            if batch.reference is None:
                raise ValueError("the reference's log-probabilities are not there: score the pairs first")
            reference = batch.reference.unflatten(1, (-1, 2))
        ratio = answers.log_probability - reference
        pairs = Compared(ratio, ratio / answers.tokens.clamp(min=1.0), answers.mean, batch.margins.double())
        losses = self.loss(pairs, self.settings)
        if self.settings.sft_weight:
            losses = losses - self.settings.sft_weight * answers.mean[..., 0]
        total = (losses * batch.counted).sum()
        return Outcome(total.float(), self._watch(total.detach(), answers, pairs, batch, head))

    @torch.no_grad()
    def _watch(
        self, total: Tensor, answers: Answers, pairs: Compared, batch: PairBatch, head: Head
    ) -> dict[str, Tensor]:
        settings, counted = self.settings, batch.counted
        assert counted is not None and batch.loss_mask is not None
        by_mean = settings.loss in ("ipo", "sigmoid_norm", "simpo", "orpo")
        rewards = settings.beta * (pairs.mean_ratio if by_mean else pairs.ratio)
        values = {
            "reward/chosen": rewards[..., 0],
            "reward/rejected": rewards[..., 1],
            "reward/margin": _gap(rewards),
            "reward/accuracy": (_gap(rewards) > 0).double(),
            "preference/logp_chosen": answers.log_probability[..., 0],
            "preference/logp_rejected": answers.log_probability[..., 1],
            "preference/longer_chosen": _gap(answers.tokens),
            "preference/kl": -pairs.ratio.mean(-1),
            "preference/sft_loss": -answers.mean[..., 0],
        }
        sums = {
            "loss": total,
            "pairs": counted.sum(),
            **{n: (v * counted).sum() for n, v in values.items() if n in self.sums},
        }
        # Every context rank knows the whole pair, and reports its share of it.
        shared = {name: value / head.context.size for name, value in sums.items()}
        return {**shared, "tokens": (batch.loss_mask > 0).sum().double()}

    def expect(self, sequences: int, seq_length: int) -> float:
        """At least a pair a row."""
        return float(sequences)


class AnswerScores(Objective):
    """Log-probability of each answer, for a reference. Shapes: reports fp64 [B, 2P], this context rank's share"""

    sums = {"answers": 1}

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        assert isinstance(batch, PairBatch)
        scores = score_answers(head, hidden, batch).log_probability.flatten(1)
        return Outcome(scores.sum(), {"answers": scores / head.context.size})
