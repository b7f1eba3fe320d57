"""The protocol of an objective: from the last hidden states and a batch to what backward runs from, and named sums."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from megalm.data.batch import Batch
from megalm.model.head import Head


@dataclass(frozen=True)
class Outcome:
    """What an objective makes of one micro-batch."""

    total: Tensor
    """Scalar that backward runs from: a sum over this rank's tokens."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """fp32, of the shapes that `Objective.sums` declares: this rank's share of each named sum. A tensor rank gives the whole
    of its data rank's, as all of them compute alike."""


class Objective:
    """Override `__call__`; declare `sums`. To add one: a file in megalm/objectives, a test on tensor, pipeline and context
    ranks.

    The step's loss is sums["loss"] / sums[divisor] over all ranks and micro-batches; what backward runs from is divided
    by the same number. Every objective counts "tokens", which the run's progress is measured in.
    """

    sums: dict[str, int] = {"loss": 1, "tokens": 1}
    """Names of the sums, alike on all ranks, with the number of values of each."""
    judged: bool = True
    """Whether the loss' height tells how the run does, and a jump of it that something is wrong."""
    divisor: str = "tokens"
    """The sum that the loss is divided by."""
    parts: frozenset[str] = frozenset()
    """Sums that are no figures of their own; the others stand in the step's record, divided as the loss is."""

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        """Shapes: hidden [S/t or S, B, H]; batch fields [B, S/c]"""
        raise NotImplementedError

    def derive(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Further figures of a step, by name, from its whole sums. What only serves here is named in `parts`."""
        return {}

    def expect(self, sequences: int, seq_length: int) -> float:
        """What the divisor will be, as far as it is known before the step: the objective's scale in backward. The update is
        corrected by the true number."""
        return float(sequences * seq_length)
