"""A sweep as a user starts it, started again, compared, and one whose input is wrong."""

import json

from tests.assembled.runs import start
from tests.small_run import small_run


def test_a_sweep_makes_a_run_for_each_value_and_its_runs_are_compared(tmp_path):
    words = ["-m", "--jobs", "2", *small_run(tmp_path, "train.sample=false", "run.name=sweep", "optim.lr=1e-2,2e-3")]
    status, shown, errors = start("megalm", "train", *words)
    folder = tmp_path / "runs" / "sweep"
    assert status == 0 and "2 runs in" in shown and "megalm compare" in shown, errors
    runs = [folder / "lr-1e-2", folder / "lr-2e-3"]
    assert all((run / "metrics.jsonl").exists() and "Traceback" not in (run / "launch.log").read_text() for run in runs)
    before = [(run / "metrics.jsonl").read_bytes() for run in runs]
    status, shown, errors = start("megalm", "train", *words)
    assert status == 0 and [(run / "metrics.jsonl").read_bytes() for run in runs] == before, errors
    page = tmp_path / "compare.html"
    status, shown, errors = start("megalm", "compare", str(folder), "--html", str(page), "--json")
    answer = json.loads(shown)
    assert status == 0 and answer["metric"] == "eval/loss", errors
    assert answer["runs"][0]["settings"] == {"optim.lr": 0.01} and answer["runs"][0]["steps"] == 6
    assert "lr-2e-3" in page.read_text() and "held-out loss" in page.read_text()


def test_a_sweep_of_wrong_input_ends_after_its_first_run(tmp_path):
    words = small_run(tmp_path, "run.name=sweep", "data.train=nowhere", "train.seed=range(1,5)")
    status, shown, errors = start("megalm.launch", "-m", *words)
    assert status == 2 and "nowhere" in shown and "3 more are not started" in shown, shown + errors
    status, shown, errors = start("megalm.launch", "-m", *words, "optim.lr=1,x")
    assert status == 2 and "optim.lr" in errors and "Traceback" not in errors
