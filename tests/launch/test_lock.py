"""One process at a time holds a run's folder: whoever comes second is told who has it, and the dead are taken over from."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.config import ConfigError, compose
from megalm.launch import lock as locks
from megalm.launch.hold import hold_run
from megalm.launch.lock import LOCK, FolderLock, read_holder, refuse_if_held
from megalm.launch.world import World

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from megalm.launch.lock import FolderLock
FolderLock(Path(sys.argv[1]), "a").acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    """Seconds as they are in a test."""
    for name, seconds in (("HANDOVER_S", 0.05), ("SETTLE_S", 0.05), ("BEAT_S", 0.05)):
        monkeypatch.setattr(locks, name, seconds)


def elsewhere(folder: Path, age: float = 0.0) -> Path:
    """The record of a process on another machine, last touched so many seconds ago."""
    folder.mkdir(exist_ok=True)
    holder = replace(FolderLock(folder, "b").own, host="far", boot="another", process=os.getpid())
    (folder / LOCK).write_text(json.dumps(holder.__dict__))
    then = (folder / LOCK).stat().st_mtime - age
    os.utime(folder / LOCK, (then, then))
    return folder / LOCK


def test_the_second_is_refused_with_the_first_ones_name_and_has_it_afterwards(tmp_path, quick):
    first = FolderLock(tmp_path, "mine")
    assert first.acquire() is None
    with pytest.raises(ConfigError, match=rf"in use: process {os.getpid()} on .* since .*run mine.*another run.name"):
        FolderLock(tmp_path, "other").acquire()
    with pytest.raises(ConfigError, match="in use"):
        refuse_if_held(tmp_path, "other")
    first.release()
    assert not (tmp_path / LOCK).exists()
    refuse_if_held(tmp_path, "other")
    second = FolderLock(tmp_path, "other")
    assert second.acquire() is None
    second.release()


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path, quick):
    words, around = [sys.executable, "-c", HOLD, tmp_path], {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(words, stdout=subprocess.PIPE, env=around)
    assert child.stdout is not None and child.stdout.readline().strip() == b"held"
    with pytest.raises(ConfigError, match=f"kill {child.pid}"):
        FolderLock(tmp_path, "a").acquire()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    mine = FolderLock(tmp_path, "a")
    former = mine.acquire()
    assert former is not None and former.process == child.pid
    assert (held := read_holder(tmp_path / LOCK)) is not None and held.process == os.getpid()
    mine.release()


@pytest.mark.parametrize("starts", [2, 8])
def test_of_many_at_the_same_moment_one_wins(tmp_path, quick, starts):
    for attempt in range(10):
        folder, barrier, won, lost = tmp_path / str(attempt), threading.Barrier(starts), [], []

        def start(folder=folder, barrier=barrier, won=won, lost=lost):
            lock = FolderLock(folder, "a")
            barrier.wait()
            try:
                lock.acquire()
                won.append(lock)
            except ConfigError:
                lost.append(lock)

        threads = [threading.Thread(target=start) for _ in range(starts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, starts - 1)
        won[0].release()


def test_another_machines_live_process_is_refused_with_the_file_to_remove(tmp_path, quick):
    path = elsewhere(tmp_path / "run")
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match=rf"on far.*remove {path}"):
        FolderLock(path.parent, "a", patience_s=30).acquire()
    ended.set()
    thread.join()


@pytest.mark.parametrize("age", [0.0, 3600.0])
def test_another_machines_silent_process_is_taken_over(tmp_path, quick, age):
    path = elsewhere(tmp_path / "run", age)
    mine = FolderLock(path.parent, "a", patience_s=0.5 if age == 0 else 600)
    former = mine.acquire()
    assert former is not None and former.host == "far"
    mine.release()


def test_two_machines_that_take_over_at_once_do_not_both_have_it(tmp_path, quick, monkeypatch):
    path = elsewhere(tmp_path / "run", 3600)
    other = replace(FolderLock(path.parent, "b").own, host="third", boot="third", token="theirs")
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: path.write_text(json.dumps(other.__dict__)))
    with pytest.raises(ConfigError, match="third"):
        FolderLock(path.parent, "a").acquire()


def test_without_locks_of_the_file_system_the_record_decides(tmp_path, quick, monkeypatch):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    monkeypatch.setattr(locks, "_runs", lambda process: process == 1)
    first = FolderLock(tmp_path, "a")
    first.own = replace(first.own, process=1)
    first.acquire()
    with pytest.raises(ConfigError, match="process 1 on"):
        FolderLock(tmp_path, "a").acquire()
    (tmp_path / LOCK).write_text(json.dumps(replace(first.own, process=2).__dict__))
    third = FolderLock(tmp_path, "a")
    assert (former := third.acquire()) is not None and former.process == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}', "\0\0"])
def test_a_damaged_record_of_nobody_is_no_obstacle(tmp_path, quick, text):
    (tmp_path / LOCK).write_text(text)
    mine = FolderLock(tmp_path, "a")
    assert mine.acquire() is None
    mine.release()


def test_a_file_that_was_removed_by_hand_is_not_removed_again(tmp_path, quick):
    first, second = FolderLock(tmp_path, "a"), FolderLock(tmp_path, "b")
    first.acquire()
    (tmp_path / LOCK).unlink()
    second.acquire()
    first.release()
    assert (held := read_holder(tmp_path / LOCK)) is not None and held.run == "b"
    second.release()


def test_the_holder_gives_signs_of_life(tmp_path, quick):
    mine = FolderLock(tmp_path, "a")
    mine.acquire()
    os.utime(tmp_path / LOCK, (1.0, 1.0))
    deadline = 200
    while (tmp_path / LOCK).stat().st_mtime == 1.0 and deadline:
        threading.Event().wait(0.05)
        deadline -= 1
    assert deadline
    mine.release()


@pytest.mark.parametrize("path", ["shared", "runs/first/checkpoints"])
def test_two_runs_with_one_place_of_checkpoints_exclude_each_other(tmp_path, quick, path):
    def configuration(name: str, *words: str):
        return compose.compose_config(["+model=tiny", f"run.dir={tmp_path}/runs", f"run.name={name}", *words])

    place = f"checkpoint.path={tmp_path}/{path}"
    first = configuration("first", *([place] if path == "shared" else []))
    with hold_run(first, tmp_path / "runs/first", World(1)):
        second = hold_run(configuration("second", place), tmp_path / "runs/second", World(1))
        with pytest.raises(ConfigError, match="run first.*another checkpoint.path"), second:
            raise AssertionError("both hold it")
        with hold_run(configuration("third"), tmp_path / "runs/third", World(1)):
            pass
    assert not list(tmp_path.rglob(LOCK))


def test_checkpoints_in_the_runs_own_folder_are_held_once(tmp_path, quick):
    config = compose.compose_config(["+model=tiny", f"checkpoint.path={tmp_path}/a"])
    with hold_run(config, tmp_path / "a", World(1)):
        pass


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("x" * 300, "too long"),
        ("file/run", "is a file"),
        ("file", "file of this name"),
        ("/proc/run", "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_is_one_message(tmp_path, folder, said):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=said):
        FolderLock(tmp_path / folder, "a").acquire()
