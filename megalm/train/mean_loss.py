"""Mean loss of held-out text: what evaluation reports, and what the guard's probe compares."""

import math
from collections.abc import Sequence

from megalm.data.batch import Batch
from megalm.parallel.collectives import all_reduce
from megalm.parallel.context import shard_batch
from megalm.parallel.mesh import Mesh
from megalm.pipeline.execute import Executor
from megalm.train.measure import sum_own


def mean_loss(executor: Executor, batches: Sequence[Batch], mesh: Mesh, seq_length: int) -> float:
    """Mean loss over the tokens of all ranks' batches that count, nats; NaN where none does. The same on every rank.

    batches: this rank's whole micro-batches, as many on every rank. seq_length: of their tensors between pipeline stages.
    The model is in evaluation mode meanwhile; afterwards the executor expects the lengths that it did before.

    Comm: the forward pass's, then one all-reduce of 3 numbers over the world
    """
    before = executor.shape
    executor.set_seq_length(seq_length)
    for chunk in executor.chunks:
        chunk.eval()
    try:
        reports = executor.evaluate([shard_batch(batch.to(mesh.device), mesh.context) for batch in batches])
    finally:
        executor.shape = before
        for chunk in executor.chunks:
            chunk.train()
    loss_sum, tokens, _ = all_reduce(sum_own(reports, mesh), mesh.world).tolist()
    return loss_sum / tokens if tokens > 0 else math.nan
