"""The folder of a refused start goes; what another process has, or what holds something, stays."""

import subprocess
import sys

import pytest

from megalm.launch.lock import LOCK
from megalm.launch.run_folder import make_run_folder, remove_unused

HOLD = """
import sys, time
from pathlib import Path
from megalm.launch.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "mine")
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_an_unused_folder_goes_with_its_empty_files(tmp_path):
    folder = tmp_path / "runs" / "mine"
    make_run_folder(folder)
    (folder / "events.jsonl").touch()
    (folder / "checkpoints").mkdir()
    remove_unused(folder, "mine")
    assert not folder.exists() and folder.parent.exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "logs/rank-0.log", "checkpoints/step-1/manifest.json"])
def test_what_holds_something_stays(tmp_path, file):
    make_run_folder(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("x")
    remove_unused(tmp_path, "mine")
    assert (tmp_path / file).read_text() == "x" and not (tmp_path / LOCK).exists()


def test_a_folder_that_another_process_has_stays_as_it_is(tmp_path):
    make_run_folder(tmp_path)
    (tmp_path / "events.jsonl").touch()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        remove_unused(tmp_path, "mine")
        assert (tmp_path / "events.jsonl").exists() and (tmp_path / "logs").is_dir() and (tmp_path / LOCK).exists()
    finally:
        other.kill()
        other.communicate()
