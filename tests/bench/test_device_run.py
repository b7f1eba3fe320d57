"""The comparison of a GPU's run with the CPU's: tried on the CPU alone, where all must be equal; and what it must find."""

import argparse
import json
import subprocess
import sys

import pytest

from tools.bench.train import device_run
from tools.subcommands import run_tool

SMALL = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.ffn_hidden_size=64",
    "model.seq_length=64",
]


def test_on_the_cpu_alone_all_is_equal(tmp_path, capsys):
    import tools.bench

    overrides = [word for override in SMALL for word in ("--override", override)]
    out = tmp_path / "result.json"
    words = ["device_run", "--device", "cpu", "--steps", "240", "--batch", "8", "--out", str(out), *overrides]
    assert run_tool(tools.bench, words) == 0, capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["differences"]["fp32"]["largest"] == 0.0 and result["differences"]["bf16"]["mean"] > 0.0
    assert result["resumed_is_bitwise"] and 0 < result["resumed_from_step"] < result["killed_after_step"] < 240
    assert result["plans"]["fp32"]["bytes_per_gpu"]["planned"] > 0


@pytest.fixture
def comparison(tmp_path):
    made = device_run._Comparison(argparse.Namespace(device="cpu", steps=6, batch=8, seconds=60, override=[]), tmp_path)
    for name in ("cpu", "fp32", "bf16", "killed"):
        (tmp_path / name).mkdir()
        records = [{"step": step, "loss": 5.0 - step / 4} for step in range(1, 7)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "killed" / "events.jsonl").write_text('{"time": 0, "step": 2, "kind": "resume"}\n')
    return made


def spoil(comparison, name, by):
    path = comparison.folder / name / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**record, "loss": record["loss"] + by}) + "\n" for record in records))


def test_what_is_equal_passes(comparison):
    assert comparison._compare(3, {})["passed"]


@pytest.mark.parametrize(("name", "by"), [("fp32", 2e-4), ("bf16", 4e-2), ("killed", 1e-9)])
def test_other_losses_fail(comparison, name, by):
    spoil(comparison, name, by=by)
    assert not comparison._compare(3, {})["passed"]


def test_a_run_that_stopped_or_failed_is_no_success(comparison):
    assert not comparison._compare(3, {"bf16": "out of time"})["passed"]
    (comparison.folder / "killed" / "events.jsonl").write_text("")
    assert not comparison._compare(3, {})["passed"]  # it began anew instead of going on


def test_a_run_that_cannot_start_is_named(comparison):
    failed = {}
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"], start_new_session=True)
    (comparison.folder / "bf16.log").write_text("what it said\n")
    comparison._finish("bf16", process, failed)
    assert failed == {"bf16": "exit status 3: what it said"}
