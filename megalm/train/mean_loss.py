"""Mean loss of held-out text: what evaluation reports, and what the guard's probe compares."""

import math
from collections.abc import Sequence

from megalm.data.batch import Batch
from megalm.parallel.collectives import all_reduce
from megalm.parallel.context import shard_batch
from megalm.parallel.mesh import Mesh
from megalm.pipeline.execute import Executor
from megalm.train.sums import Sums


class Evaluator:
    """The objective's mean over held-out batches, on whatever layout.

    Args:
        sums: what the stages report; `divisor`: the sum that the loss is divided by.
        seq_length: positions in the tensors between pipeline stages (`build.find_local_seq_length`).
    """

    def __init__(self, executor: Executor, sums: Sums, divisor: str, mesh: Mesh, seq_length: int) -> None:
        self.executor, self.mesh, self.seq_length = executor, mesh, seq_length
        self.sums, self.divisor = sums, divisor

    def mean_loss(self, batches: Sequence[Batch]) -> float:
        """Loss of all ranks' batches over what it is divided by (tokens: nats a token); NaN where none counts. The same on
        every rank.

        batches: this rank's whole micro-batches, as many on every rank. The model is in evaluation mode meanwhile;
        afterwards the executor expects the lengths that it did before.

        Comm: the forward pass's, then one all-reduce of the objective's sums over the world
        """
        executor = self.executor
        before = executor.shape
        executor.set_seq_length(self.seq_length)
        for chunk in executor.chunks:
            chunk.eval()
        try:
            reports = executor.evaluate(
                [shard_batch(batch.to(self.mesh.device), self.mesh.context) for batch in batches]
            )
        finally:
            executor.shape = before
            for chunk in executor.chunks:
                chunk.train()
        message = all_reduce(self.sums.pack(reports, self.mesh), self.mesh.world)
        sums = self.sums.unpack(message.cpu().numpy())
        counted = float(sums[self.divisor].sum())
        return float(sums["loss"].sum()) / counted if counted > 0 else math.nan
