"""What a run leaves to go on from, as a user meets it: killed, on a full disk, begun anew, with a place that refuses.

One rank alone is tried in tests/train, without the cost of a start.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.checkpoint.commit import list_committed, parse_step
from megalm.checkpoint.reader import CheckpointReader
from tests.assembled.runs import MINUTES, ROOT, Run, surroundings, train
from tests.small_run import small_run


def steps(place: Path) -> list[int]:
    return [parse_step(path) for path in list_committed(place)]


def begin(folder: Path, *overrides: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a small run and come back at once. before: a command that ends in starting another."""
    words = [*small_run(folder, "train.sample=false", "train.eval_every=0"), *overrides]
    return subprocess.Popen(
        [*before, sys.executable, "-m", "megalm.launch", *words],
        cwd=ROOT, env=surroundings(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], folder: Path) -> Run:
    shown, errors = process.communicate(timeout=60 * MINUTES)
    return Run(folder / "runs" / "small", process.returncode, shown, errors)


def wait_for(sign: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60 * MINUTES
    while not list(sign.parent.glob(sign.name)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_cannot_save_ends_with_status_1_and_says_so(tmp_path, ranks):
    """No file may grow as large as a checkpoint's: each save fails, also those that nobody waits for."""
    limited = ("bash", "-c", 'ulimit -f 60; exec "$@"', "limited")
    run = end(begin(tmp_path, "train.steps=4", "checkpoint.every=2", f"world_size={ranks}", before=limited), tmp_path)
    run.ended_well(status=1)
    assert run.errors.strip().splitlines()[-1].startswith("error: the state of step 4 is not saved")
    assert "there is no checkpoint" in run.errors and steps(run.folder / "checkpoints") == []
    assert [event["step"] for event in run.of("checkpoint_failed")] == [2, 4, 4], "the last one is tried once more"
    train(tmp_path, "train.steps=4").ended_well()


def test_a_place_that_is_lost_while_the_run_trains_fails_it_and_the_next_start_goes_on(tmp_path):
    process = begin(tmp_path, "train.steps=1000000", "checkpoint.every=2", "checkpoint.keep=1")
    place = tmp_path / "runs" / "small" / "checkpoints"
    wait_for(place / "step-00000004", process)
    os.rename(place, tmp_path / "hidden")
    place.write_text("no folder")
    process.send_signal(signal.SIGTERM)
    run = end(process, tmp_path).ended_well(status=1)
    assert "is not saved" in run.errors and "the newest checkpoint is of step" in run.errors
    place.unlink()
    os.rename(tmp_path / "hidden", place)
    (newest,) = steps(place)[:1]
    again = train(tmp_path, f"train.steps={newest + 2}").ended_well()
    assert again.records[-1]["step"] == newest + 2 and f"resumed at step {newest}" in again.shown


@pytest.mark.parametrize("ranks", [2])
def test_a_run_killed_while_it_saves_goes_on_and_clears_up(tmp_path, ranks):
    more = [f"world_size={ranks}", "train.eval_every=0"]
    process = begin(tmp_path, "train.steps=1000000", "checkpoint.every=1", *more)
    place = tmp_path / "runs" / "small" / "checkpoints"
    wait_for(place / "step-00000003", process)
    wait_for(place / "*.tmp-*", process)
    os.killpg(process.pid, signal.SIGKILL)  # with its ranks, as when a machine goes down
    process.communicate()
    newest = steps(place)[0]
    (place / f"step-{newest + 5:08d}.tmp-0123456789ab").mkdir()
    run = train(tmp_path, f"train.steps={newest + 3}", "train.eval_every=0", ranks=ranks).ended_well()
    assert [record["step"] for record in run.records] == list(range(1, newest + 4))
    assert sorted(os.listdir(place)) == [f"step-{step:08d}" for step in steps(place)][::-1]
    CheckpointReader(place / f"step-{newest + 3:08d}")


@pytest.mark.parametrize("ranks", [2])
def test_beginning_anew_twice_loses_nothing_and_mixes_nothing(tmp_path, ranks):
    train(tmp_path, "train.steps=6", ranks=ranks).ended_well()
    anew = ("checkpoint.resume=false", "train.steps=3")
    for number in (1, 2):
        run = train(tmp_path, *anew, ranks=ranks).ended_well()
        assert f"earlier-{number}" in run.shown
    place = run.folder / "checkpoints"
    assert [steps(place / name) for name in ("", "earlier-1", "earlier-2")] == [[3], [6, 3], [3]]
    last = train(tmp_path, "train.steps=4", ranks=ranks).ended_well()
    assert [record["step"] for record in last.records] == [1, 2, 3, 4]
    assert len(last.of("set_aside")) == 1 and "resumed at step 3" in last.shown
    assert not {event["step"] for event in last.events} & {5, 6}


@pytest.mark.parametrize("ranks", [2])
def test_a_run_of_non_finite_numbers_ends_with_status_1_and_keeps_its_good_checkpoints(tmp_path, ranks):
    jump = ["guard.provoke.kind=lr_jump", "guard.provoke.factor=1e20", "guard.provoke.step=5"]
    run = train(tmp_path, "guard=off", *jump, "train.steps=40", "checkpoint.keep=1", ranks=ranks).ended_well(status=1)
    assert "not finite" in run.errors.strip().splitlines()[-1]
    assert len(run.records) < 40 and steps(run.folder / "checkpoints") == [3]
