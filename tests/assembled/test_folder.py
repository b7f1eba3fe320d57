"""A run's folder is evidence: one process writes there, and only what was trained."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.assembled.runs import ROOT, Run, start, surroundings, train
from tests.small_run import small_run

LONG = ("train.steps=100000", "train.eval_every=0", "checkpoint.every=5", "train.sample=false")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begin(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """A start that is not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "megalm.launch", *small_run(folder, *overrides)],
        cwd=ROOT, env=surroundings(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until_saved(folder: Path, *processes: subprocess.Popen[str]) -> None:
    """Until there is a checkpoint; of several starts all but one may end before."""
    deadline = time.monotonic() + 300
    while not list(folder.glob("runs/*/checkpoints/step-*[0-9]")):
        assert any(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_done_stays_and_what_goes_on_tells_what_changed(tmp_path):
    first = train(tmp_path).ended_well()
    before = files(first.folder)
    words = ("optim.lr=1e-3", "train.seed=7", "model.rope_theta=5e5", "guard=off", "train.eval_sequences=2")
    assert "was made with other settings" in train(tmp_path, *words).ended_well(2).errors
    assert files(first.folder) == before

    again = train(tmp_path, "optim.lr=1e-3", "optim.min_lr=1e-4", "guard=off", "train.log_every=1").ended_well()
    assert "this run is complete" in again.shown
    assert files(first.folder) == before

    def batch(step: int) -> list[str]:
        status, shown, errors = start("tools.inspect", "batch", str(first.folder), "--step", str(step), "--json")
        assert status == 0, errors
        return [sample["text"] for sample in json.loads(shown)["samples"]]

    third = batch(3)
    on = train(tmp_path, "train.steps=8", "optim.lr=1e-3", "optim.min_lr=1e-4", "optim.weight_decay=0.2").ended_well()
    (changed,) = on.of("changed")
    assert changed["step"] == 6 and changed["lr_before"] != changed["lr_now"]
    assert {each["key"] for each in changed["changes"]} == {
        "train.steps", "optim.lr", "optim.min_lr", "optim.weight_decay",
    }  # fmt: skip
    assert "optim.weight_decay 0.1 -> 0.2" in on.shown and "leaves its course: step 7" in on.shown
    kept = sorted(path.name for path in (on.folder / "configs").iterdir())
    assert kept == ["0001-step-00000001.yaml", "0002-step-00000007.yaml"]
    assert (on.folder / "configs" / kept[0]).read_bytes() == before["config.yaml"] != files(on.folder)["config.yaml"]

    allowed = "checkpoint.allow_changes=[train.seed,train.global_batch_size]"
    train(tmp_path, "train.steps=10", "train.seed=7", "train.global_batch_size=4", allowed).ended_well()
    assert batch(3) == third and len(batch(8)) == 8 and len(batch(9)) == 4


def test_two_starts_at_once_and_one_after_a_kill(tmp_path):
    processes = [begin(tmp_path, *LONG, f"train.seed={seed}") for seed in (1, 2)]
    wait_until_saved(tmp_path, *processes)
    refused, deadline = None, time.monotonic() + 300
    while refused is None:
        refused = next((process for process in processes if process.poll() is not None), None)
        assert time.monotonic() < deadline, "both train"
        time.sleep(0.05)
    alive = next(process for process in processes if process is not refused)
    _, errors = refused.communicate()
    assert refused.returncode == 2 and f"process {alive.pid} on " in errors and "Traceback" not in errors
    alive.kill()
    alive.communicate()

    other = begin(tmp_path, *LONG, "train.seed=1" if alive is processes[0] else "train.seed=2")
    folder = tmp_path / "runs/small"
    deadline = time.monotonic() + 300
    while other.poll() is None and b"took_over" not in (folder / "events.jsonl").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(other.pid, signal.SIGTERM)
    shown, errors = other.communicate(timeout=300)
    run = Run(folder, other.returncode, shown, errors).ended_well(130)
    assert run.of("start")[-1]["took_over"][0].startswith(f"process {alive.pid} on ")
    assert not list(folder.rglob("run.lock"))
    steps = [record["step"] for record in run.records]
    assert steps == list(range(1, len(steps) + 1))


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "plain").touch()
    for words, said in (
        (("run.name=" + "x" * 300,), "too long"),
        ((f"run.dir={tmp_path}/plain",), "is a file"),
        (("run.dir=/proc/runs",), "cannot be written"),
    ):
        status, _, errors = start("megalm.launch", *small_run(tmp_path, *words))
        assert status == 2 and said in errors and "Traceback" not in errors, errors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path):
    launcher = begin(tmp_path, *LONG, "world_size=2")
    wait_until_saved(tmp_path, launcher)
    launcher.kill()
    folder, deadline = tmp_path / "runs/small", time.monotonic() + 300
    while not all("status 130" in (folder / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)):
        assert time.monotonic() < deadline, "the ranks train on unseen"
        time.sleep(0.1)
    launcher.communicate()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (folder / f"checkpoints/step-{last:08d}").is_dir()


def test_a_start_that_is_refused_leaves_no_folder_and_takes_nothing_from_one_that_is_there(tmp_path):
    (tmp_path / "file").write_text("")
    refused = train(tmp_path, f"checkpoint.path={tmp_path}/file/below").ended_well(2)
    assert "a part of the path is a file" in refused.errors and not refused.folder.exists()
    kept = refused.folder / "logs" / "rank-0.log"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    train(tmp_path, f"checkpoint.path={tmp_path}/file/below").ended_well(2)
    assert kept.exists()
