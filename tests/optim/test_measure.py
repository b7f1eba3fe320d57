"""What a step measures beside its loss: exact where it is said to be, and close where it is a sample."""

import pytest
import torch

from megalm.model.logits import largest_logits
from megalm.optim.stretches import TensorIndex
from megalm.optim.update_sample import UpdateSample
from tests.optim.test_rules import train


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_largest_logit_of_each_head_is_exact_on_the_queries_that_are_looked_at(groups, masked):
    torch.manual_seed(groups)
    length, batch, heads, width = 32, 3, 4, 8
    q, k = torch.randn(length, batch, heads, width), torch.randn(length, batch, groups, width)
    seen = torch.ones(length, length).tril().bool()
    mask = None
    if masked:
        ids = torch.randint(3, (batch, length)).sort().values
        mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
        seen = mask[:, 0]
    logits = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(heads // groups, 2)) * 0.3
    logits = logits.masked_fill(~(seen[:, None] if masked else seen), -torch.inf)
    expected = logits[:, :, 3::4].amax(dim=(0, 2, 3))
    assert torch.allclose(largest_logits(q, k, 0.3, mask), expected, atol=1e-5)


def test_short_sequences_are_looked_at_whole():
    q, k = torch.randn(5, 1, 2, 4), torch.randn(5, 1, 2, 4)
    logits = torch.einsum("sbhd,tbhd->bhst", q, k).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    assert torch.allclose(largest_logits(q, k, 1.0, None), logits.amax(dim=(0, 2, 3)))


def test_the_sampled_update_is_near_the_whole_one(tmp_path):
    _, signals, trainer = train(tmp_path, ["guard=off"], steps=4)
    assert signals[-1].update_rms is None and signals[-1].attention_logit is None
    optimizer = trainer.optimizer
    optimizer.begin_step(1)
    for parameter in trainer.model_chunks[0].parameters():
        (parameter * torch.randn_like(parameter)).sum().backward()
    optimizer.finish_gradients()
    parts = optimizer.parts()
    index = TensorIndex(parts, trainer.mesh)
    sample = UpdateSample(parts, index, trainer.config.optim)
    step = optimizer.step_count + 1
    found = (sample.sums(step, 0.5) / sample.counts).sqrt()
    for part in parts:
        for s in part.stretches:
            here = slice(s.start, s.stop)
            g = part.gradient()[here] * 0.5
            first, second = part.exp_avg[here] * 0.9 + 0.1 * g, part.exp_avg_sq[here] * 0.95 + 0.05 * g**2
            update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            exact = update.square().mean().sqrt().item()
            limit = 1e-4 if update.numel() <= 128 else 0.35
            assert found[index.number[s.piece.name]].item() == pytest.approx(exact, rel=limit), s.piece.name
