"""A hook of one's own, on any layout, without a change to the engine."""

import pytest

from megalm.train.hooks import Hook
from tests.train.layouts import same_on_every_layout


class Ease(Hook):
    """Lowers the learning rate with the loss, and refuses every third update."""

    name = "ease"

    def __init__(self):
        self.first, self.seen = None, 0

    def on_gradients(self, trainer, signals):
        self.first, self.seen = self.first or signals.loss, self.seen + 1
        trainer.control.set_rate_factor(self.name, signals.loss / self.first)
        return self.seen % 3 > 0


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context"])
def test_a_hook_of_ones_own_gives_the_same_run_on_every_layout(tmp_path, axis):
    numbers = same_on_every_layout(tmp_path, axis, ("loss", "grad_norm", "lr_scale", "skipped"), hook=Ease)
    assert [skipped for *_, skipped in numbers] == [0, 0, 1, 0, 0, 1, 0, 0] and numbers[-1][2] < 1.0
