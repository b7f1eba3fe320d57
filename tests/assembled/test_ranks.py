"""Ranks that die, stop or are told to end, in runs started as a user starts them: nothing lost, nothing left, the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.assembled.runs import ROOT, Run, surroundings, train
from tests.small_run import small_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks' processes in /proc")

STEPS = 150
WORDS = (f"train.steps={STEPS}", "train.eval_every=50", "checkpoint.every=30", "train.sample=false", "world_size=2")


class Started:
    """A run under way, and the processes that belong to it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.mark = folder / "runs/small", uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megalm.launch", *small_run(folder, *WORDS, *words)],
            cwd=ROOT, env={**surroundings(), "MEGALM_MARK": self.mark}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> list[int]:
        """All that are alive, the launcher among them."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                alive = "\nState:\tZ" not in (path.parent / "status").read_text()
                if alive and f"MEGALM_MARK={self.mark}".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def rank(self, number: int) -> int:
        """The process of a rank: the one that has the file for its own stacks open, and no other's."""
        for pid in self.processes():
            try:
                links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            stacks = {link for link in links if "megalm-stacks-" in link}
            if len(stacks) == 1 and f"megalm-stacks-{number}" in stacks.pop():
                return pid
        raise AssertionError(f"rank {number} does not run")

    def wait_for(self, what: str, seconds: float = 120) -> None:
        """Until a file of the run's folder is there."""
        deadline = time.monotonic() + seconds
        while not list(self.folder.glob(what)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.02)

    def end(self, seconds: float = 120) -> Run:
        """Wait for the launcher's end; nothing of the run is left five seconds later."""
        shown, errors = self.process.communicate(timeout=seconds)
        self.assert_nothing_left()
        return Run(self.folder, self.process.returncode, shown, errors)

    def assert_nothing_left(self, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while self.processes():
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.processes()]
            time.sleep(0.05)


def losses(run: Run) -> dict[int, float]:
    """Of each step the last time that it was made."""
    return {record["step"]: record["loss"] for record in run.records}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    return losses(train(tmp_path_factory.mktemp("undisturbed"), *WORDS, ranks=2).ended_well())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_run_ends_as_if_nothing_had_been(tmp_path, undisturbed, rank):
    started = Started(tmp_path)
    started.wait_for("checkpoints/step-00000030")
    assert "libtorch" not in Path(f"/proc/{started.process.pid}/maps").read_text(), "a launcher is light"
    victim = started.rank(rank)
    os.kill(victim, signal.SIGKILL)
    run = started.end().ended_well()
    (lost,) = run.of("rank_lost")
    assert (lost["rank"], lost["pid"], lost["exit"]) == (rank, victim, "signal 9 (SIGKILL)")
    (restart,) = run.of("restart")
    assert restart["attempt"] == 1 and restart["source"] == "checkpoint" and restart["world_size"] == 2
    assert restart["step"] % 30 == 0 and restart["lost_steps"] == max(0, lost["step"] - restart["step"])
    assert sum(restart["phases"].values()) == pytest.approx(restart["seconds"], abs=0.05)
    assert losses(run) == undisturbed
    assert f"rank {rank} was killed by signal 9 (SIGKILL)" in run.errors and "restart 1 of 3" in run.errors
    assert "rank_lost" in run.report and "restart" in run.report


def test_a_stopped_rank_is_found_and_replaced(tmp_path, undisturbed):
    started = Started(tmp_path)
    started.wait_for("checkpoints/step-00000030")
    os.kill(started.rank(1), signal.SIGSTOP)
    stopped = time.time()
    run = started.end().ended_well()
    (hang,) = run.of("hang")
    assert hang["rank"] == 1 and hang["frozen"] and hang["time"] - stopped < 10
    (stacks,) = hang["stacks"]  # the stopped one cannot answer
    assert "Thread" in Path(stacks).read_text() and Path(stacks).name == "stacks-0-rank-0.txt"
    assert losses(run) == undisturbed


def test_without_restarts_the_run_gives_up_with_a_report(tmp_path):
    started = Started(tmp_path, "resilience.max_restarts=0")
    started.wait_for("checkpoints/step-00000030")
    os.kill(started.rank(0), signal.SIGKILL)
    run = started.end().ended_well(3)
    assert run.of("give_up")[0]["rank"] == 0 and not run.of("restart")
    assert "resilience.max_restarts=0 allows no restart" in run.errors and "newest checkpoint is of step" in run.errors
    assert "give_up" in run.report
    on = train(tmp_path, *WORDS, ranks=2).ended_well()
    assert sorted(losses(on)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_ends_with_130(tmp_path, undisturbed, number):
    started = Started(tmp_path, "checkpoint.every=0")
    started.wait_for("metrics.jsonl")
    started.process.send_signal(number)
    run = started.end().ended_well(130)
    last = run.records[-1]["step"]
    assert last < STEPS and (run.folder / f"checkpoints/step-{last:08d}").is_dir()
    assert run.of("preempted")[0]["signal"] == number.name
    if number == signal.SIGTERM:
        assert losses(train(tmp_path, *WORDS, ranks=2).ended_well()) == undisturbed


def test_a_second_interrupt_ends_at_once_and_says_what_is_lost(tmp_path):
    started = Started(tmp_path, "checkpoint.every=0", "train.steps=100000")
    started.wait_for("metrics.jsonl")
    while (started.folder / "metrics.jsonl").read_text().count("\n") < 20:
        time.sleep(0.02)
    os.kill(started.rank(1), signal.SIGSTOP)  # so that nobody can save
    for _ in range(2):
        time.sleep(0.3)
        started.process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    run = started.end().ended_well(1)
    assert time.monotonic() - begun < 5 and "a second SIGINT: ended at once" in run.errors
    assert "There is no checkpoint" in run.errors


def test_who_cannot_save_in_time_ends_in_time(tmp_path):
    started = Started(tmp_path, "train.steps=100000", "resilience.grace_s=2")
    started.wait_for("checkpoints/step-00000030")
    os.kill(started.rank(0), signal.SIGSTOP)
    started.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    run = started.end().ended_well(1)
    assert 1.5 < time.monotonic() - begun < 8
    assert "did not save within resilience.grace_s=2" in run.errors and "newest checkpoint is of step" in run.errors


def test_a_rank_that_stands_while_its_launcher_dies_is_gone_too(tmp_path):
    started = Started(tmp_path, "train.steps=100000", "resilience.grace_s=2")
    started.wait_for("checkpoints/step-00000030")
    started.process.kill()
    started.process.communicate()
    started.assert_nothing_left(15)
    run = Run(started.folder, 0, "", "")
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run.folder / f"checkpoints/step-{last:08d}").is_dir(), "the ranks saved what they had"
