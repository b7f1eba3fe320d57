"""The training benchmark: its table is whole, a side that fails or finds no time is named, and a GPU's plan beside it."""

import json

import pytest
import torch

from megalm.plan.machine import make_planned_machine
from tools.bench.train import _matrix, train
from tools.bench.train._sides import Job
from tools.subcommands import run_tool

TINY = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 32, "vocab_size": 64, "seq_length": 16}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on a tiny shape, whichever is named; returns its exit status and what it wrote."""
    import tools.bench

    def run(*words):
        out = tmp_path / "result.json"
        status = run_tool(tools.bench, ["train", "--device", "cpu", "--threads", "1", "--out", str(out), *words])
        return status, json.loads(out.read_text()) if out.exists() else None

    monkeypatch.setattr(train, "SHAPES", {"50m": TINY, "1b": TINY})
    monkeypatch.setattr(_matrix, "SIZE", 128)
    return run


def test_sides_take_turns_and_start_alike(bench, capsys):
    status, result = bench("--sides", "megalm,reference", "--rounds", "2", "--steps", "1")
    assert status == 0 and set(result["tokens_per_second"]) == {"megalm", "reference"}
    assert result["last_loss"]["megalm"] == pytest.approx(result["last_loss"]["reference"], abs=1e-5)
    assert "megalm / reference" in capsys.readouterr().out
    assert set(result["ratios"]) == {"reference"} and not result["failed"]


def test_every_ratio_stands_beside_the_share_of_the_matmul_rate_of_the_same_run(bench, monkeypatch, capsys):
    rates = iter([3e6, 1e6, 2e6])
    asked = []
    monkeypatch.setattr(_matrix, "measure_matrix_flops", lambda *how: asked.append(how) or next(rates))
    status, result = bench("--sides", "megalm,reference", "--rounds", "3", "--steps", "1")
    assert status == 0 and asked == [("fp32", 1, 128)] * 3
    assert result["matrix_flops"] == {"median": 2e6, "lowest": 1e6, "highest": 3e6, "size": 128}
    for name, rate in result["tokens_per_second"].items():
        assert result["matrix_share"][name] == pytest.approx(result["flops_per_token"] * rate / 2e6)
    assert result["ratios"]["reference"]["shares"] == result["matrix_share"]
    shown = capsys.readouterr().out
    ours, theirs = (f"{100 * result['matrix_share'][name]:.1f}%" for name in ("megalm", "reference"))
    assert f"at {ours} and {theirs} of the machine's matmul rate" in shown
    assert "of matmul" in shown and "MFU" not in shown


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_matmul_rate_is_the_best_of_its_repeats_and_leaves_the_threads_as_they_are(monkeypatch, dtype):
    threads = torch.get_num_threads()
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(_matrix.time, "perf_counter", lambda: next(ticks))
    assert _matrix.measure_matrix_flops(dtype, 1, 8) == 2 * 8**3 / 2.0 and torch.get_num_threads() == threads


def test_a_side_that_ends_early_is_named(bench, monkeypatch, capsys):
    monkeypatch.setattr(train, "SHAPES", {"1b": {**TINY, "num_heads": 3}})  # 16 / 3
    status, result = bench("--shape", "1b", "--sides", "megalm", "--rounds", "1", "--steps", "1")
    assert status == 1 and result["failed"] == {"megalm": "the process of megalm ended early"}
    assert "megalm: the process of megalm ended early" in capsys.readouterr().out


def test_what_finds_no_time_is_said(bench, capsys):
    assert bench("--sides", "megalm", "--seconds", "0")[0] == 1
    assert "megalm: not begun: out of time" in capsys.readouterr().out


def test_unknown_sides_and_missing_gpus_are_refused(bench, monkeypatch, capsys):
    assert bench("--sides", "nobody")[0] == 2
    assert bench("--device", "cuda")[0] == 2 or torch.cuda.is_available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train._choose(None, "cuda") == (
        ["megalm", "plain", "plain-compiled", "reference"],
        dict.fromkeys(("transformers", "transformers-compiled"), "transformers is not installed"),
    )


def test_what_is_known_of_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("megalm.plan.machine.measure_this_machine", lambda: make_planned_machine("h100", 4))
    known = train._gpu(Job(train.SHAPES["1b"], 4, "bf16", "cuda", 1, "", False))
    assert known["peak_flops"] == pytest.approx(989.4e12)
    assert known["flops_per_token"] == pytest.approx(6 * 1.2e9, rel=0.2)
    assert 25 * 2**30 < known["planned"]["bytes"] < 79 * 2**30
