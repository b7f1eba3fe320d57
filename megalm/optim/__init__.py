"""Optimizers over flat, sharded buffers; gradient clipping; learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from megalm.optim.fully_sharded import FullyShardedOptimizer
    from megalm.optim.sharded import ShardedOptimizer
    from megalm.parallel.mesh import Mesh


def build_optimizer(
    chunks: Sequence[nn.Module], optim: Any, mesh: Mesh, parallel: Any
) -> ShardedOptimizer | FullyShardedOptimizer:
    """Build the optimizer that parallel.data_mode asks for; with nobody to share with both modes are the same.

    Under fully_shard the weights are whole only during backward: pipelines must not split it (Executor's
    split_backward=False).
    """
    if parallel.data_mode == "fully_shard" and mesh.data_context.size > 1:
        from megalm.optim.fully_sharded import FullyShardedOptimizer

        return FullyShardedOptimizer(chunks, optim, mesh)
    from megalm.optim.sharded import ShardedOptimizer

    return ShardedOptimizer(chunks, optim, mesh, parallel)
