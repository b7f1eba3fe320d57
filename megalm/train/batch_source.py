"""Where batches come from, as the trainer and its hooks see it: the loader, or anything that gives out what it would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megalm.data.batch import Batch
from megalm.data.phases import Phase
from megalm.pipeline.execute import Executor

if TYPE_CHECKING:
    from megalm.model.transformer import Transformer
    from megalm.optim.fully_sharded import FullyShardedOptimizer
    from megalm.optim.sharded import ShardedOptimizer


@dataclass(frozen=True)
class Engine:
    """What a source that computes its batches uses of the run."""

    model_chunks: Sequence[Transformer]
    """In training, on this rank."""
    executor: Executor
    """Of these."""
    optimizer: ShardedOptimizer | FullyShardedOptimizer
    """Whose updates the weights are waited for."""


class BatchSource(Protocol):
    """Gives each data rank its micro-batches of one stream of samples, of which it knows the position.

    Every rank calls the same methods in the same order; a method that says nothing of ranks answers alike on all of them.
    """

    def bind(self, engine: Engine) -> None:
        """The run is built: a source that needs it to make its batches takes it."""
        ...

    @property
    def source_names(self) -> list[str]:
        """Names of what is mixed, in the order in which a batch's `sources` counts them."""
        ...

    @property
    def phase(self) -> Phase:
        """The phase of the next global batch: its batch size and sequence length."""
        ...

    def phase_at(self, step: int) -> Phase:
        """The phase of update number `step`, counted from 0."""
        ...

    @property
    def samples_consumed(self) -> int:
        """Position in the stream: samples given out so far, with the skipped ones that lay before."""
        ...

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        ...

    def next_positions(self) -> np.ndarray:
        """Positions that the next global batch takes, all ranks together. Shapes: -> int64 [global batch]"""
        ...

    def evaluation_batches(self, sequences: int | None = None) -> list[Batch]:
        """This rank's micro-batches of held-out samples: the same on every call, as many on every rank; [] for none."""
        ...

    def skip(self, first_sample: int, last_sample: int) -> None:
        """Positions [first_sample, last_sample) are not given out any more."""
        ...

    def reseed(self, seed: int, position: int | None = None) -> bool:
        """From here (or `position`) on the rest comes in another order. False where the order cannot be changed."""
        ...

    def describe(self, positions: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """For each position what it holds, in words for a report: at least `source`, `document` and `offset`."""
        ...

    def measure(self) -> dict[str, float]:
        """What the last global batch was like, for the step's record; alike on every rank. {} where there is nothing to tell."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, as plain JSON values, on whatever layout."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was asked."""
        ...

    def close(self) -> None:
        """End what works in the background."""
        ...


class WrappedSource(BatchSource):
    """Another source, of which a subclass changes what it overrides; the rest is the other's."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def bind(self, engine: Engine) -> None:
        self.source.bind(engine)

    @property
    def source_names(self) -> list[str]:
        return self.source.source_names

    @property
    def phase(self) -> Phase:
        return self.source.phase

    def phase_at(self, step: int) -> Phase:
        return self.source.phase_at(step)

    @property
    def samples_consumed(self) -> int:
        return self.source.samples_consumed

    def next(self) -> list[Batch]:
        return self.source.next()

    def next_positions(self) -> np.ndarray:
        return self.source.next_positions()

    def evaluation_batches(self, sequences: int | None = None) -> list[Batch]:
        return self.source.evaluation_batches(sequences)

    def skip(self, first_sample: int, last_sample: int) -> None:
        self.source.skip(first_sample, last_sample)

    def reseed(self, seed: int, position: int | None = None) -> bool:
        return self.source.reseed(seed, position)

    def describe(self, positions: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        return self.source.describe(positions)

    def measure(self) -> dict[str, float]:
        return self.source.measure()

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def close(self) -> None:
        self.source.close()
