"""What `megalm launch` writes: scripts that bash runs with schedulers of our own in their place, and yaml of the right form."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.assembled.runs import ROOT, json_lines, surroundings
from tests.small_run import small_run
from tools.launch import _job
from tools.launch.__main__ import main

MODEL = ("+model=tiny", "device=cpu", "run.name=mine")


def write(capsys, *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def program(folder: Path, name: str, text: str) -> None:
    """Put a program of this name on the path of `start`."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def start(folder: Path, script: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-c", script], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**surroundings(), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment},
    )  # fmt: skip


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------- slurm
@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, True), (2, False), (3, False), (130, False), (137, True)]
)
def test_slurm_puts_into_the_queue_again_what_a_start_may_mend(tmp_path, capsys, status, requeued):
    script = write(capsys, "slurm", "--nodes", "2", "--ranks", "2", *MODEL, "train.global_batch_size=8")
    program(tmp_path, "srun", f'echo "$@" "$MASTER_ADDR" "$MASTER_PORT" > srun; exit {status}')
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" > requeued; fi')
    process = start(tmp_path, script, SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="node[7-8]")
    process.communicate(timeout=30)
    assert process.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
    called = (tmp_path / "srun").read_text()
    assert "python -m megalm.launch +model=tiny" in called and called.endswith("node7 24711\n")


def test_slurm_ends_after_so_many_restarts(tmp_path, capsys):
    script = write(capsys, "slurm", "--ranks", "2", "--restarts", "4", *MODEL)
    program(tmp_path, "srun", "exit 1")
    program(tmp_path, "scontrol", "touch requeued")
    process = start(tmp_path, script, SLURM_JOB_ID="1", SLURM_RESTART_COUNT="4")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and not (tmp_path / "requeued").exists() and "after 4 restarts" in errors


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_s_signals_reach_the_ranks_which_save(tmp_path, capsys, number, requeued):
    script = write(capsys, "slurm", "--ranks", "2", *MODEL)
    program(tmp_path, "srun", "trap 'touch saved; exit 130' USR1; touch up; while true; do sleep 0.1; done")
    program(tmp_path, "scontrol", "touch requeued")
    process = start(tmp_path, script, SLURM_JOB_ID="1")
    wait_for(tmp_path / "up")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 130 and (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_asks_for_what_was_said_and_for_time_to_save(capsys):
    words = ("--nodes", "2", "--ranks", "4", "--partition", "gpu", "--cpus", "6", "--time", "1:00:00")
    script = write(
        capsys, "slurm", *words, "+model=tiny", "run.name=mine", "resilience.grace_s=300", "train.global_batch_size=8"
    )
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6", "--partition=gpu",
                   "--signal=B:USR1@390", "--requeue", "--time=1:00:00"):  # fmt: skip
        assert wanted in options
    assert "--wait=330 " in script


# --------------------------------------------------------------------------------------------------------------- jobset
def jobset(capsys, *words: str) -> dict:
    return yaml.safe_load(write(capsys, "jobset", "--image", "megalm:1", *words))


def script_of(document: dict) -> str:
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]["command"][2]


def test_a_jobset_starts_again_all_but_what_was_refused_or_given_up(capsys):
    words = ("--nodes", "3", "--ranks", "8", "--restarts", "5", "--queue", "team", "--claim", "disk")
    document = jobset(capsys, *words, "+model=tiny", "run.name=mine", "train.global_batch_size=24")
    assert document["metadata"] == {"name": "mine", "labels": {"kueue.x-k8s.io/queue-name": "team"}}
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 5
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (3, 3, 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3]
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 60 and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert {"name": "runs", "mountPath": "/workspace/runs"} in container["volumeMounts"]


def test_a_claim_is_mounted_where_the_runs_are_also_if_that_is_elsewhere(capsys):
    document = jobset(capsys, "--claim", "disk", "+model=tiny", "run.name=mine", "run.dir=/mnt/runs")
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "runs", "mountPath": "/mnt/runs"} in container["volumeMounts"]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((2, 1), 2), ((1, 2), 2), ((3, 3), 3), ((1, 137), 1), ((130, 130), 130), ((130, 1), 1)],
)
def test_a_node_ends_as_its_ranks_did(tmp_path, capsys, statuses, expected):
    document = jobset(capsys, "--nodes", "2", "--ranks", "2", *MODEL)
    program(
        tmp_path,
        "python",
        f"echo $WORLD_SIZE $LOCAL_RANK > rank-$RANK; case $RANK in 2) exit {statuses[0]};; *) exit {statuses[1]};; esac",
    )
    process = start(tmp_path, script_of(document), JOB_COMPLETION_INDEX="1")
    process.communicate(timeout=30)
    assert process.returncode == expected
    assert (tmp_path / "rank-2").read_text() == "4 0\n" and (tmp_path / "rank-3").read_text() == "4 1\n"


def test_a_rank_that_stands_when_another_is_lost_is_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_job, "SPARE_S", 0)
    document = jobset(capsys, "--nodes", "2", "--ranks", "2", "resilience.grace_s=1", *MODEL)
    program(tmp_path, "python", "if [ $RANK = 0 ]; then exit 1; fi; exec sleep 300")
    process = start(tmp_path, script_of(document), JOB_COMPLETION_INDEX="0")
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_a_pod_that_is_evicted_saves(tmp_path, capsys):
    document = jobset(capsys, "--nodes", "2", "--ranks", "2", *MODEL)
    program(tmp_path, "python", "trap 'exit 130' TERM; touch up-$RANK; while true; do sleep 0.1; done")
    process = start(tmp_path, script_of(document), JOB_COMPLETION_INDEX="0")
    for rank in (0, 1):
        wait_for(tmp_path / f"up-{rank}")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_the_scripts_of_two_nodes_train_one_run(tmp_path, capsys):
    words = [word for word in small_run(tmp_path, "run.name=mine", "train.sample=false") if word != "run.name=small"]
    document = jobset(capsys, "--nodes", "2", "--ranks", "1", *words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program(tmp_path, "python", f'cd {ROOT}; exec {sys.executable} "$@"')
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [start(tmp_path, script_of(document), JOB_COMPLETION_INDEX=str(node), **meeting) for node in (0, 1)]
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    records = json_lines(tmp_path / "runs/mine/metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 7))


def test_a_trainjob_takes_its_place_from_the_runtime(capsys):
    words = ("trainjob", "--image", "megalm:1", "--nodes", "2", "--ranks", "4", "+model=tiny", "run.name=mine")
    document = yaml.safe_load(write(capsys, *words, "train.global_batch_size=8"))
    assert document["kind"] == "TrainJob" and document["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = document["spec"]["trainer"]
    assert trainer["numNodes"] == 2 and trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 4}}
    assert "node=$PET_NODE_RANK" in trainer["command"][2] and "MASTER_ADDR=$PET_MASTER_ADDR" in trainer["command"][2]


# ---------------------------------------------------------------------------------------------------------------- local
@pytest.mark.parametrize(("first", "starts"), [(1, 2), (137, 2), (2, 1), (3, 1), (130, 1)])
def test_local_starts_again_what_broke_off(tmp_path, capsys, first, starts):
    script = write(capsys, "local", "--ranks", "2", *MODEL).replace("sleep 10", "sleep 0")
    program(tmp_path, "python", f'echo "$@" >> starts; [ $(wc -l < starts) = 1 ] && exit {first}; exit 0')
    process = start(tmp_path, script)
    process.communicate(timeout=30)
    lines = (tmp_path / "starts").read_text().splitlines()
    assert len(lines) == starts and lines[0].endswith("world_size=2")
    assert process.returncode == (0 if starts == 2 else first)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("slurm", "run.name=mine"), "choose a model"),
        (("slurm", "+model=tiny"), "run.name=NAME"),
        (("slurm", "+model=tiny", "run.name=mine", "world_size=2"), "--nodes and --ranks"),
        (("slurm", "--nodes", "0", *MODEL), "--nodes 0: at least 1"),
        (("slurm", *MODEL, "checkpoint.every=0"), "checkpoint.every above 0"),
        (("local", "--nodes", "2", *MODEL), "local is one machine"),
        (("jobset", "--image", "i", "+model=tiny", "run.name=My_Run"), "run.name=My_Run"),
        (("slurm", "--ranks", "3", *MODEL, "parallel.tensor=2"), "tensor"),
        (("slurm", *MODEL, "optim.lr=-1"), "optim.lr"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, capsys, words, said):
    out = tmp_path / "job"
    assert main([*words, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err and not out.exists()
