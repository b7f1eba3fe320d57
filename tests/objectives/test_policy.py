"""Policy losses beside the formulas of their papers, written out text by text; values and gradients."""

import math

import pytest
import torch

from megalm.config.policy import PolicyConfig
from megalm.objectives.policy import Policy, estimate_kl
from megalm.parallel.mesh import Axis
from megalm.posttrain.advantages import compute_advantages
from megalm.posttrain.packing import Text, pack_texts

BUDGET = 6
KINDS = {
    "grpo": PolicyConfig(ratio="token", aggregate="sequences", clip_low=0.2, clip_high=0.2, dual_clip=0),
    "dapo": PolicyConfig(ratio="token", aggregate="tokens", clip_low=0.2, clip_high=0.28, dual_clip=0),
    "dual": PolicyConfig(ratio="token", aggregate="tokens", clip_low=0.2, clip_high=0.2, dual_clip=1.5),
    "dr_grpo": PolicyConfig(ratio="token", aggregate="budget", clip_low=0.2, clip_high=0.2, dual_clip=0),
    "gspo": PolicyConfig(ratio="sequence", aggregate="sequences", clip_low=0.1, clip_high=0.15),
    "cispo": PolicyConfig(ratio="truncated", aggregate="tokens", clip_high=0.3),
    "rloo": PolicyConfig(ratio="trajectory", aggregate="sequences", clip_low=0.2, clip_high=0.2),
}


class FakeHead:
    """A head whose log-probabilities are given."""

    context = Axis("context")

    def __init__(self, scores):
        self.scores = scores

    def log_probabilities(self, hidden, labels, temperature):
        return self.scores


def make_case():
    """Texts of different lengths and advantages, packed into rows, and what the policy now says of each position."""
    generator = torch.Generator().manual_seed(3)
    texts = []
    for number, (prompt, length) in enumerate([(3, 5), (2, 2), (4, 6), (1, 1), (2, 4), (3, 3)]):
        drawn = (-torch.rand(length, generator=generator) * 2 - 0.2).tolist()
        texts.append(
            Text(
                list(range(1, prompt + 1)),
                list(range(20, 20 + length)),
                drawn,
                [1.2, -0.7, -1.5, 0.4, 0.9, -0.3][number],
                True,
            )
        )
    batch = pack_texts(texts, 16, 2, together=True)
    noise = 0.6 * torch.randn(batch.tokens.shape, generator=generator)
    scores = (batch.drawn + noise).t().clone().requires_grad_()
    return texts, batch, scores


def list_texts(batch, scores):
    """(log p now, log q, A) of each text, found by its row and number."""
    found = []
    for row in range(batch.tokens.shape[0]):
        for text in range(int(batch.texts[row].max()) + 1):
            places = (batch.texts[row] == text) & (batch.loss_mask[row] > 0)
            if places.any():
                found.append(
                    (scores[:, row][places], batch.drawn[row][places], float(batch.advantages[row][places][0]))
                )
    return found


def clip(ratio, low, high):
    return torch.clamp(ratio, 1 - low, 1 + high)


def formula(kind, found):
    """The paper's loss."""
    settings, total, tokens = KINDS[kind], 0.0, sum(len(now) for now, _, _ in found)
    for now, old, advantage in found:
        ratio = (now - old).exp()
        if kind in ("gspo", "rloo"):
            ratio = (now - old).mean().exp() if kind == "gspo" else (now - old).sum().exp()
        loss = -torch.minimum(ratio * advantage, clip(ratio, settings.clip_low, settings.clip_high) * advantage)
        if kind == "dual" and advantage < 0:
            loss = torch.minimum(loss, torch.tensor(-1.5 * advantage))
        if kind == "cispo":
            loss = -ratio.detach().clamp_max(1.3) * advantage * now
        if kind in ("gspo", "rloo"):
            total = total + loss / len(found)
        elif kind == "grpo":
            total = total + loss.mean() / len(found)
        elif kind == "dr_grpo":
            total = total + loss.sum() / (len(found) * BUDGET)
        else:
            total = total + loss.sum() / tokens
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_papers(kind):
    _, batch, scores = make_case()
    expected = formula(kind, list_texts(batch, scores))
    (right,) = torch.autograd.grad(expected, scores)
    objective = Policy(KINDS[kind], BUDGET, 1.0)
    outcome = objective(FakeHead(scores), None, batch)
    divisor = outcome.sums[objective.divisor]
    (gradient,) = torch.autograd.grad(outcome.total / divisor, scores)
    torch.testing.assert_close(outcome.sums["loss"] / divisor, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-6)
    assert 0 < float(outcome.sums["policy/clipped"] / divisor) < 1


def test_what_is_not_learned_counts_nothing():
    texts, _, _ = make_case()
    ignored = [Text(t.prompt, t.completion, t.drawn, t.advantage, number != 2) for number, t in enumerate(texts)]
    batch = pack_texts(ignored, 16, 2, together=True)
    assert int(batch.loss_mask.sum()) == sum(len(t.completion) for t in texts) - 6
    assert float(batch.shares.sum()) == pytest.approx(5)


@pytest.mark.parametrize(
    ("form", "meant"),
    [("k1", None), ("k2", "reverse"), ("k3", "forward"), ("k3_weighted", "reverse"), ("k3_k2", "reverse")],
)
def test_the_gradient_of_each_kl_form_is_the_one_that_is_told(form, meant):
    """The mean over all tokens of the estimate's gradient, beside the divergences' own."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.5, 0.4, -0.9], dtype=torch.float64).log_softmax(0)
    scores = logits.log_softmax(0)
    drawn = scores.detach()
    estimate = estimate_kl(scores - reference, (scores - drawn).exp(), form)
    (found,) = torch.autograd.grad((drawn.exp() * estimate).sum(), logits, retain_graph=True)
    reverse = (scores.exp() * (scores - reference)).sum()
    forward = (reference.exp() * (reference - scores)).sum()
    if meant is None:
        assert found.abs().max() < 1e-12
        return
    (right,) = torch.autograd.grad(reverse if meant == "reverse" else forward, logits)
    torch.testing.assert_close(found, right)
    value = float((drawn.exp() * estimate.detach()).sum())
    assert form == "k2" or value == pytest.approx(float(reverse.detach()))


def test_advantages_are_taken_within_the_group():
    rewards, everything = (
        torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]]).double().numpy(),
        torch.ones(2, 4).bool().numpy(),
    )
    standard = compute_advantages(rewards, everything, PolicyConfig(advantage="standardized"))
    assert standard[0, 0] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4)) and not standard[1].any()
    centered = compute_advantages(rewards, everything, PolicyConfig(advantage="centered"))
    assert centered[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    others = compute_advantages(rewards, everything, PolicyConfig(advantage="leave_one_out"))
    assert others[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    partly = everything.copy()
    partly[0, 1:] = False
    assert not compute_advantages(rewards, partly, PolicyConfig())[0].any()  # nobody to compare with
