"""What a step measures beside its loss: exact where it is said to be, and close where it is a sample."""

import pytest
import torch

from megalm.optim.stretches import TensorIndex
from megalm.optim.update_sample import UpdateSample
from tests.optim.test_rules import train


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
    sample = UpdateSample(parts, index)
    step = optimizer.step_count + 1
    found = (sample.sums(step, 0.5) / sample.counts).sqrt()
    for part in parts:
        for s in part.stretches:
            here = slice(s.start, s.stop)
            g = part.gradient()[here] * 0.5
            first, second = (
                part.state["exp_avg"][here] * 0.9 + 0.1 * g,
                part.state["exp_avg_sq"][here] * 0.95 + 0.05 * g**2,
            )
            update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            exact = update.square().mean().sqrt().item()
            limit = 1e-4 if update.numel() <= 128 else 0.35
            assert found[index.number[s.piece.name]].item() == pytest.approx(exact, rel=limit), s.piece.name
