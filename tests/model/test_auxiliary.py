"""Losses and sums from inside the model: on any stage, under recomputation, once."""

import pytest
import torch
from torch import nn

from megalm.config.compose import compose_config
from megalm.launch.resolve import resolve
from megalm.model.auxiliary import Auxiliary, attach_loss
from megalm.model.transformer import Layer
from megalm.objectives.next_token import NextToken
from megalm.parallel.mesh import build_mesh
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.small_run import small_run


def test_an_attached_loss_is_differentiated_by_the_scale_at_backward():
    hidden, weight = torch.randn(3, requires_grad=True), torch.tensor([2.0, -1.0], requires_grad=True)
    scale = torch.ones(())
    out = attach_loss(hidden, weight**2, scale)
    assert torch.equal(out, hidden)
    scale.fill_(0.25)
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(hidden.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(weight.grad, 0.25 * 2 * weight.detach())


def test_sums_of_one_name_add_up():
    auxiliary = Auxiliary(torch.ones(()))
    hidden = auxiliary.attach(
        torch.zeros(2, requires_grad=True), "balance", torch.tensor([1.0, 2.0], requires_grad=True)
    )
    auxiliary.report("balance", torch.tensor(4.0))
    assert hidden.requires_grad and auxiliary.sums["balance"].item() == 7.0


class Penalized(nn.Module):
    """A layer that also keeps its input small: 10 * sum x^2."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden, where):
        hidden = where.auxiliary.attach(hidden, "penalty", 10.0 * hidden.square().sum())
        return self.layer(hidden, where)


def train(world, arguments, folder, penalized=True):
    config = compose_config(arguments)
    resolve(config, world)
    objective = NextToken()
    objective.sums |= {"penalty": 1}
    run = build_trainer(config, build_mesh(config.parallel, "cpu"), folder, objective=objective)
    for chunk in run.model_chunks if penalized else []:
        chunk.layers = nn.ModuleList(Penalized(layer) for layer in chunk.layers)
    records = [run.train_step() for _ in range(3)]
    run.checkpoints.close()
    run.batch_source.close()
    return [(record["loss"], record["grad_norm"], record["penalty"]) for record in records]


@pytest.mark.parametrize("words", [["parallel.pipeline=2"], ["parallel.data=2"], ["parallel.recompute=full"]], ids=str)
def test_a_loss_of_every_layer_gives_the_same_run_on_every_layout(tmp_path, words):
    arguments = small_run(tmp_path, "train.eval_every=0", "train.eval_sequences=0", "guard=off")
    (alone,) = run_ranks(1, train, 1, arguments, tmp_path)
    ranks = 1 if "recompute" in words[0] else 2
    for found in run_ranks(ranks, train, ranks, [*arguments, *words], tmp_path):
        assert found == [pytest.approx(step, rel=2e-5) for step in alone]
    (without,) = run_ranks(1, train, 1, arguments, tmp_path, False)
    assert alone[0][0] == without[0][0] and alone[0][1] != pytest.approx(without[0][1], rel=1e-3)
    assert without[0][2] == 0.0 < alone[0][2]
