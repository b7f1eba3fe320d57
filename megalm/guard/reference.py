"""What the probe's loss is compared with: that of weights that were known to be well."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megalm.config.guard import GuardConfig
from megalm.guard.probe import Probe, use_other_weights
from megalm.guard.snapshots import SnapshotRing

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class Reference:
    """The probe, and what it gave when the run was well: with the weights of a snapshot, or noted now and then without any.

    Nothing is spent on it before something is odd: with snapshots the reference is found when it is asked for.
    """

    def __init__(self, config: GuardConfig, ring: SnapshotRing) -> None:
        self.config, self.ring = config, ring
        self.probe: Probe | None = None
        self.known: float | None = None
        """Where there are no snapshots: the probe's loss when the run was last seen to be well."""
        self.every = 0
        """Steps between two notes of it; 0: snapshots are kept."""

    def prepare(self, trainer: Trainer) -> None:
        """Lay out the held-out text, and choose the interval."""
        if self.config.probe_sequences:
            batches = trainer.batch_source.evaluation_batches(self.config.probe_sequences)
            self.probe = Probe(trainer.evaluator, batches) if batches else None
        if not self.ring.lags:
            # A forward pass is a third of a sequence's step: at this interval the probe is a quarter of a percent of all.
            share = self.config.probe_sequences / (3 * trainer.config.train.global_batch_size)
            self.every = max(16, math.ceil(share / 0.0025))

    def is_due(self, step: int) -> bool:
        """Where no snapshots are kept: at the interval, and at powers of two, since losses fall fast at first."""
        return self.every > 0 and (step % self.every == 0 or step >= 16 and step & (step - 1) == 0)

    def note(self) -> None:
        """Keep the probe's loss, unless it says that the state is not clean."""
        if self.probe is not None:
            loss = self.probe.loss()
            if self.known is None or loss - self.known <= self.config.probe_excess:
                self.known = loss

    def excess(self, trainer: Trainer, onset: int) -> float | None:
        """The probe's loss with the weights as they are, above that with those of the newest trusted snapshot; None: unknown."""
        if self.probe is None:
            return None
        now, known = self.probe.loss(), self.known
        if self.ring.lags:
            snapshot = self.ring.choose(onset - self.config.margin) or self.ring.choose(onset - 1)
            if snapshot is None:
                return None
            if snapshot.probe is None:
                with use_other_weights(trainer, trainer.boxes(), snapshot.tensors):
                    snapshot.probe = self.probe.loss()
            known = snapshot.probe
        return None if known is None else now - known
