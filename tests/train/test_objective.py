"""An objective and a batch field of one's own, on any layout, without a change to the engine."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megalm.config.compose import compose_config
from megalm.data.batch import Batch, along
from megalm.launch.resolve import resolve
from megalm.objectives.objective import Objective, Outcome
from megalm.parallel.mesh import build_mesh
from megalm.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.small_run import small_run


@dataclass(frozen=True)
class TwoLabels(Batch):
    others: Tensor | None = along("batch", "sequence")


class SquaredDistance(Objective):
    """Mean squared distance from 1 of the margin between two sets of labels, in log-probability."""

    sums = {"loss": 1, "tokens": 1, "distance": 1}

    def __call__(self, head, hidden, batch):
        first, second = (head.log_probabilities(hidden, labels.t()) for labels in (batch.labels, batch.others))
        total = (first - second - 1.0).square().sum()
        count = torch.tensor(float(first.numel()))
        return Outcome(
            total, {"loss": total.detach(), "tokens": count, "distance": (first - second).abs().sum().detach()}
        )


def train(world, arguments, folder):
    config = compose_config(arguments)
    resolve(config, world)
    trainer = Trainer(config, build_mesh(config.parallel, "cpu"), folder, objective=SquaredDistance())
    fetch = trainer.loader.next
    own = {name: None for name in ("tokens", "labels", "loss_mask", "positions", "document_ids", "sources")}

    def two_labels():
        batches = [TwoLabels(**{name: getattr(batch, name) for name in own}) for batch in fetch()]
        return [replace(batch, others=batch.tokens.flip(1)) for batch in batches]

    trainer.loader.next = two_labels
    records = [trainer.train_step() for _ in range(4)]
    trainer.checkpoints.close()
    trainer.loader.close()
    return [(record["loss"], record["grad_norm"], record["distance"]) for record in records]


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context", "data"])
def test_an_objective_of_ones_own_gives_the_same_run_on_every_layout(tmp_path, axis):
    arguments = small_run(tmp_path, "train.eval_every=0", "train.eval_sequences=0", "guard=off", "train.steps=9")
    (alone,) = run_ranks(1, train, 1, arguments, tmp_path)
    assert alone[-1][0] < alone[0][0]
    for found in run_ranks(2, train, 2, [*arguments, f"parallel.{axis}=2"], tmp_path):
        assert found == [pytest.approx(step, rel=2e-5) for step in alone]
