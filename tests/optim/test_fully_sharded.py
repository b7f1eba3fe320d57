"""What fully sharded data parallelism refuses, and how much it keeps on a rank. (That it trains alike: test_sharded.py.)"""

import pytest
import torch
from torch import nn

from megalm.config import ConfigError, OptimConfig, ParallelConfig
from megalm.optim import build_optimizer
from megalm.optim.fully_sharded import FullyShardedOptimizer
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.initialize import initialize
from megalm.parallel.linear import ColumnParallelLinear, Output
from megalm.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_ranks

PARALLEL = ParallelConfig(data_mode="fully_shard")


class Chunk(nn.Module):
    def __init__(self, mesh, dtype=torch.float32):
        super().__init__()
        common = dict(bias=True, sequence_parallel=False, init_std=0.1, dtype=dtype)
        # 5 rows on 2 ranks: shards of 3 and 2.
        self.linear = ColumnParallelLinear(4, [Output("a", 5)], mesh.tensor, **common)

    def forward(self, x):
        return self.linear(x)


def one_step(dtype, counts):
    mesh = build_mesh(PARALLEL)
    chunk = Chunk(mesh, dtype)
    initialize(chunk, 0)
    optimizer = build_optimizer([chunk], OptimConfig(), mesh, PARALLEL)
    try:
        optimizer.begin_step(counts[mesh.rank], even=len(set(counts)) == 1)
    except ConfigError as error:
        return str(error)
    y = chunk(torch.ones(3, 2, 4, dtype=dtype))
    y.float().sum().backward()
    optimizer.finish_gradients()
    norm, bad = optimizer.statistics()
    boxes = [(box.name, box.offset, tuple(box.tensor.shape), box.tensor.dtype) for box in optimizer.boxes()]
    return y.dtype, float(norm), int(bad), boxes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_rank_keeps_its_rows_in_fp32(dtype):
    first, second = run_ranks(2, one_step, dtype, [1, 1])
    # d(sum)/dW = 6 for each of 20 elements on each of 2 ranks, d(sum)/db = 6 for each of 5: 25 elements of 12.
    for computed, norm, bad, _ in (first, second):
        assert computed == dtype and bad == 0 and norm == pytest.approx(25**0.5 * 12, rel=1e-6)
    wanted = {"a.weight": (4,), "a.bias": ()}
    for rank, (_, _, _, boxes) in enumerate((first, second)):
        rows, start = (3, 0) if rank == 0 else (2, 3)
        assert [name for name, *_ in boxes[:2]] == list(wanted)
        for name, offset, shape, kept in boxes:
            rest = wanted[name.removeprefix("optimizer.exp_avg.").removeprefix("optimizer.exp_avg_sq.")]
            assert (offset[0], shape, kept) == (start, (rows, *rest), torch.float32)


def test_ranks_with_different_numbers_of_micro_batches_are_refused():
    for rank, message in enumerate(run_ranks(2, one_step, torch.float32, [1, 2])):
        assert f"this one has {rank + 1}" in message and "data_mode=replicate" in message


def test_a_parameter_in_two_chunks_is_refused_and_one_rank_has_nobody_to_share_with():
    mesh = Mesh.single()
    first, second = Chunk(mesh), Chunk(mesh)
    second.linear.weight = first.linear.weight
    with pytest.raises(ConfigError, match="V-shaped"):
        FullyShardedOptimizer([first, second], OptimConfig(), mesh)
    assert isinstance(build_optimizer([Chunk(mesh)], OptimConfig(), mesh, PARALLEL), ShardedOptimizer)
