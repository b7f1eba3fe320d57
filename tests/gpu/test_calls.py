"""The two calls on a GPU machine, gone through at tiny sizes on this one: the script itself cannot fail first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gpu.stages import CALLS, LIMIT

ROOT = Path(__file__).resolve().parents[2]


def run(call, folder, *more):
    words = [
        "bash",
        "scripts/gpu_check.sh",
        call,
        "--pretend",
        "cpu",
        "--results",
        str(folder),
        "--python",
        sys.executable,
    ]
    environment = {**os.environ, "MEGALM_COMMIT": "abc1234"}
    return subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)


@pytest.mark.parametrize("call", CALLS)
def test_every_stage_of_a_call_passes_and_leaves_its_results(tmp_path, call):
    done = run(call, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and not [name for name in files if name.startswith(".")]
    (summary,) = tmp_path.glob(f"*-abc1234-{call.lower()}.json")
    found = json.loads(summary.read_text())
    wanted = {stage.name for stage in CALLS[call]}
    assert wanted <= set(found["stages"]) and found["call"] == call
    outcomes = {name: stage["outcome"] for name, stage in found["stages"].items()}
    assert all(text == "passed" or text.startswith("skipped") for text in outcomes.values()), outcomes


def test_a_call_ends_when_its_time_is_up_and_keeps_what_it_knows(tmp_path):
    done = run("A", tmp_path, "probe", "device_run", "--seconds", "6")
    assert done.returncode == 1
    (summary,) = tmp_path.glob("*-a.json")
    stages = json.loads(summary.read_text())["stages"]
    assert "out of time" in stages["device_run"]["outcome"] or "not run" in stages["device_run"]["outcome"]
    assert stages["probe"]["results"]


def test_both_calls_fit_their_time_and_a_wrong_word_is_refused(tmp_path):
    assert LIMIT <= 330
    done = run("A", tmp_path, "nowhere")
    assert done.returncode == 2 and "nowhere: call A has the stages" in done.stderr
    assert run("C", tmp_path).returncode == 2
