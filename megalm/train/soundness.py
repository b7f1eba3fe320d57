"""Whether a run's weights can still be good: what is not finite is not saved, and is not trained on for long."""

import math

import torch

from megalm.parallel.collectives import all_reduce
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Box
from megalm.train.signals import Signals

HOPELESS = 8
"""Updates in a row with a loss or gradient that is not finite, after which a run ends. One may come of a single bad batch;
weights that are not finite give such a loss at every step, and no update makes them finite again."""


class Soundness:
    """Follows the numbers that each step measures anyway, on every rank alike. Costs a step nothing while all is well."""

    def __init__(self) -> None:
        self.since: int | None = None
        """First step of the present trouble; None where there is none."""
        self.streak = 0
        """Steps in a row that were not finite and were applied."""
        self.unproven = False
        """Whether the last loss or gradient that was measured was not finite."""

    @property
    def hopeless(self) -> bool:
        return self.streak >= HOPELESS

    def see(self, step: int, signals: Signals, applied: bool) -> bool:
        """Take note of a step; whether it shows the weights that it began with to be good."""
        if not applied:
            return False
        finite = math.isfinite(signals.loss) and math.isfinite(signals.grad_norm) and not signals.nonfinite
        if finite:
            self.streak, self.unproven = 0, False
            return True
        self.streak += 1
        self.doubt(step)
        return False

    def doubt(self, step: int) -> None:
        """The weights after this step may not be finite."""
        self.unproven = True
        if self.since is None:
            self.since = step

    def warning(self) -> str:
        """What the trouble means, when it begins."""
        return (
            "loss or gradient is not finite, and the update was applied: while weights are not finite the run is not saved, "
            f"and after {HOPELESS} such updates in a row it ends"
        )

    def advice(self, good: int | None) -> str:
        """How to go on after a run that ended in trouble. good: last step known to be good."""
        return (
            f"The last weights that gave a finite loss are those of step {good}: to go on from a checkpoint up to there, give "
            "checkpoint.load_path=FOLDER/step-... with checkpoint.resume=false, and a smaller optim.lr; guard=default refuses "
            "such updates by itself."
        )

    def confirm(self, boxes: list[Box], mesh: Mesh) -> bool:
        """Whether the run may be saved: looks at every value where there is doubt. Comm: then one all-reduce."""
        if self.since is None:
            return True
        broken = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        for box in boxes:
            broken += (~torch.isfinite(box.tensor)).any()
        if all_reduce(broken, mesh.world).item() > 0:
            return False
        self.since = None
        return True
