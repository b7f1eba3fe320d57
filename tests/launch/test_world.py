"""A launcher's variables: understood, or refused in one sentence."""

import pytest

from megalm.config import Config, ConfigError
from megalm.config.resilience import ResilienceConfig
from megalm.launch import world as module
from megalm.launch.world import World, check_places, find_world

MEETING = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_NTASKS": "", "SLURM_PROCID": "0"}, "SLURM_NTASKS=:"),
        ({"SLURM_NTASKS": "4(x2)", "SLURM_PROCID": "0"}, "SLURM_NTASKS=4(x2)"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", **MEETING}, "with srun"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, "without MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "9", "SLURM_STEP_ID": "0", **MEETING}, "from 0 to 3"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "without MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "without MASTER_ADDR:"),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING, "MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING, "MASTER_PORT": "70000"}, "from 1 to 65535"),
        ({"RANK": "5", "WORLD_SIZE": "2", **MEETING}, "RANK=5 with WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MEETING}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "7", **MEETING}, "LOCAL_RANK=7"),
        ({"RANK": "0", "WORLD_SIZE": "two", **MEETING}, "WORLD_SIZE=two"),
        ({"RANK": "0", **MEETING}, "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2", **MEETING}, "without RANK"),
    ],
)
def test_variables_that_cannot_be_meant_are_refused(environment, said):
    with pytest.raises(ConfigError) as refused:
        find_world(Config(device="cpu"), environment)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_step_of_srun_is_a_rank():
    world = find_world(Config(), {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", **MEETING})
    assert (world.size, world.rank, world.external) == (4, 0, True)


def test_a_job_of_one_task_starts_its_own_ranks():
    assert not find_world(Config(device="cpu"), {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).external


@pytest.mark.parametrize(
    ("settings", "world", "said"),
    [
        (ResilienceConfig(min_ranks=5), World(4), "resilience.min_ranks=5, but the run has 4 ranks"),
        (ResilienceConfig(min_ranks=2), World(4, external=True), "resilience.min_ranks=2, but another launcher"),
        (ResilienceConfig(spares=1), World(4, external=True), "resilience.spares=1, but another launcher"),
        (ResilienceConfig(spares=5), World(4), "torch sees 8 GPUs here: set world_size to at most 3"),
    ],
)
def test_fewest_ranks_and_spares_that_cannot_be_are_refused(settings, world, said, monkeypatch):
    monkeypatch.setattr(module, "count_accelerators", lambda config: 8)
    with pytest.raises(ConfigError) as refused:
        check_places(Config(resilience=settings), world)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_spares_are_left_out_of_the_world_that_the_gpus_make(monkeypatch):
    monkeypatch.setattr(module, "count_accelerators", lambda config: 8)
    config = Config(resilience=ResilienceConfig(spares=2))
    assert find_world(config, {}).size == 6
    check_places(config, World(6))
