"""An objective, a batch field and a source of batches of one's own, on any layout, without a change to the engine."""

from dataclasses import dataclass

import pytest
import torch

from megalm.data.batch import Batch, declare_dims
from megalm.objectives.objective import Objective, Outcome
from megalm.train.batch_source import WrappedSource
from tests.train.layouts import same_on_every_layout


@dataclass(frozen=True)
class TwoLabels(Batch):
    others: torch.Tensor | None = declare_dims("batch", "sequence")


class Reversed(WrappedSource):
    def next(self):
        return [TwoLabels(**vars(batch), others=batch.tokens.flip(1)) for batch in super().next()]


class SquaredDistance(Objective):
    """Mean squared distance from 1 of the margin between two sets of labels, in log-probability."""

    sums = {"loss": 1, "tokens": 1, "distance": 1}

    def __call__(self, head, hidden, batch):
        margin = head.log_probabilities(hidden, batch.labels.t()) - head.log_probabilities(hidden, batch.others.t())
        total, count = (margin - 1.0).square().sum(), torch.tensor(float(margin.numel()))
        return Outcome(total, {"loss": total.detach(), "tokens": count, "distance": margin.detach().abs().sum()})


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context", "data"])
def test_an_objective_of_ones_own_gives_the_same_run_on_every_layout(tmp_path, axis):
    names = ("loss", "grad_norm", "distance")
    steps = same_on_every_layout(tmp_path, axis, names, objective=SquaredDistance, source=Reversed)
    assert steps[-1][0] < steps[0][0]
