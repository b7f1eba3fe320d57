"""The grid of ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megalm.config import ConfigError, ParallelConfig
from megalm.parallel.collectives import all_reduce
from megalm.parallel.mesh import Mesh, build_mesh, choose_local_device
from tests.distributed import run_ranks

AXES = (
    *(
        "data",
        "context",
        "tensor",
        "pipeline",
        "expert",
        "expert_tensor",
        "expert_block",
        "data_context",
        "expert_data",
    ),
    *("pipeline_ends", "world"),
)


def describe(layout):
    mesh = build_mesh(ParallelConfig(**layout))
    found = {}
    for name in AXES:
        axis = getattr(mesh, name)
        total = all_reduce(torch.tensor([1 << mesh.rank]), axis)
        found[name] = (axis.size, axis.rank, axis.ranks, int(total), axis.group is None)
    return mesh.rank, mesh.world_size, found


def test_tensor_is_fastest_and_pipeline_slowest():
    for rank, world_size, axes in run_ranks(8, describe, dict(tensor=2, context=2, pipeline=2)):
        assert world_size == 8
        tensor, context, pipeline = rank % 2, rank // 2 % 2, rank // 4
        assert [axes[n][1] for n in ("tensor", "context", "pipeline", "data")] == [tensor, context, pipeline, 0]
        assert axes["tensor"][2] == (rank - tensor, rank - tensor + 1)
        assert axes["context"][2] == (rank - 2 * context, rank - 2 * context + 2)
        assert axes["pipeline"][2] == axes["pipeline_ends"][2] == (rank % 4, rank % 4 + 4)
        assert axes["data_context"][2] == axes["context"][2]
        assert axes["data"][0] == 1 and axes["data"][4]
        for _, _, ranks, total, _ in axes.values():  # messages reach exactly the ranks of the axis
            assert total == sum(1 << r for r in ranks)


def test_experts_are_folded_over_the_ranks_of_a_stage():
    for rank, _, axes in run_ranks(8, describe, dict(tensor=2, expert=2)):
        assert axes["data"][:2] == (4, rank // 2)
        low = rank - rank % 2
        assert axes["expert"][2] == axes["expert_block"][2] == (low, low + 1)
        assert axes["expert_data"][2] == tuple(range(rank % 2, 8, 2))
        assert axes["expert_tensor"][0] == 1


def test_parts_of_experts_are_neighbours_and_stages_have_blocks_of_their_own():
    layout = dict(context=2, pipeline=2, expert=2, expert_tensor=2)
    for rank, _, axes in run_ranks(8, describe, layout):
        low = rank - rank % 4
        assert axes["expert_block"][2] == tuple(range(low, low + 4)) and axes["expert_block"][1] == rank % 4
        assert axes["expert_tensor"][2] == (rank - rank % 2, rank - rank % 2 + 1)
        assert axes["expert"][2] == (low + rank % 2, low + rank % 2 + 2) and axes["expert"][1] == rank % 4 // 2
        assert axes["expert_data"][0] == 1
        for _, _, ranks, total, _ in axes.values():
            assert total == sum(1 << r for r in ranks)


def middle_stage(pipeline):
    mesh = build_mesh(ParallelConfig(pipeline=pipeline))
    dist.barrier()  # a rank that leaves at once closes connections that the others are still making
    return mesh.pipeline_ends.size, mesh.pipeline_ends.rank


def test_only_the_ends_of_a_pipeline_are_pipeline_ends():
    assert run_ranks(4, middle_stage, 4) == [(2, 0), (1, 0), (1, 0), (2, 1)]


def blocks():
    tensor = build_mesh(ParallelConfig(tensor=4)).tensor
    block = tensor.block(2)
    total = all_reduce(torch.tensor([dist.get_rank()]), block)
    return block.ranks, int(total), tensor.block(4) is tensor, tensor.block(1).size


def test_blocks_of_the_tensor_axis():
    for rank, found in enumerate(run_ranks(4, blocks)):
        low = rank - rank % 2
        assert found == ((low, low + 1), 2 * low + 1, True, 1)


def test_one_process_needs_no_process_group():
    assert not dist.is_initialized()
    for mesh in (Mesh.single("cpu"), build_mesh(ParallelConfig())):
        assert mesh.world_size == 1
        for name, other in itertools.combinations(AXES, 2):
            assert getattr(mesh, name).size == getattr(mesh, other).size == 1
    with pytest.raises(ConfigError, match="needs a process group"):
        build_mesh(ParallelConfig(tensor=2))


def refused(layout):
    try:
        build_mesh(ParallelConfig(**layout))
    except ConfigError as error:
        return str(error)


def test_layouts_that_do_not_fit_the_world_are_refused():
    assert "4 ranks cannot be split into tensor=3" in run_ranks(4, refused, dict(tensor=3))[0]
    assert (
        "parallel.expert=3 x expert_tensor=1 must divide data x context x tensor, which is 4"
        in run_ranks(4, refused, dict(expert=3))[0]
    )


def test_device_of_a_local_rank(monkeypatch):
    assert choose_local_device("cpu", 3) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert choose_local_device("cuda", 3) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_local_device("cuda") == torch.device("cuda", 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # bound to one of its own
    assert choose_local_device("cuda") == torch.device("cuda", 0)
