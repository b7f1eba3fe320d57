"""Runs that an earlier version began, killed after their checkpoint at step 20, go on with the losses that it would have had.

The folders in `earlier/` were written by commit f319284 with plain PyTorch ops, one rank and two tensor ranks; the expected
losses are those of that commit, which went on from them to step 40.
"""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_run import write_corpus

EARLIER = Path(__file__).with_name("earlier")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["one", "two"])
def test_an_earlier_run_goes_on_as_it_would_have(name, tmp_path):
    expected = json.loads((EARLIER / f"{name}-expected.json").read_text())
    shutil.copytree(EARLIER / name, tmp_path / "runs" / name)
    write_corpus(tmp_path, documents=40, length=80)
    done = subprocess.run(
        [sys.executable, "-m", "megalm.launch", *expected["command"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    losses = {str(row["step"]): row["loss"] for row in rows[20:]}
    evaluations = {str(row["step"]): row["eval/loss"] for row in rows[20:] if "eval/loss" in row}
    exact = torch.backends.cpu.get_cpu_capability() == "AVX512" and platform.machine() == "x86_64"
    allowed = 0.0 if exact else 1e-5  # another processor's matrix products round otherwise
    assert losses == pytest.approx(expected["losses"], rel=allowed, abs=0)
    assert evaluations == pytest.approx(expected["evaluations"], rel=allowed, abs=0)
