"""Runs side by side."""

import json

import pytest

from megalm.config import ConfigError
from megalm.observe.runs import (
    find_runs,
    list_differing_settings,
    rank,
    shorten,
    smooth,
    summarize,
    tabulate_comparison,
    write_comparison_page,
)


def make_run(folder, lr, losses, held_out=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run: {{name: {folder.name}}}\noptim: {{lr: {lr}, betas: [0.9, 0.95]}}\n")
    rows = [{"step": step, "loss": loss, "tokens_per_s": 100.0} for step, loss in enumerate(losses, 1)]
    if held_out is not None:
        rows[-1]["eval/loss"] = held_out
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "a", 1e-3, [5.0, 4.0, 3.0], 3.2)
    make_run(tmp_path / "b", 2e-3, [5.0, 4.0, 3.5], 3.1)
    return [summarize(folder) for folder in find_runs([tmp_path])]


def test_only_what_differs_is_a_column(runs):
    assert list_differing_settings(runs) == ["optim.lr"]
    headers, rows = tabulate_comparison(runs, "eval/loss")
    assert headers[:3] == ["run", "optim.lr", "steps"] and rows[0][:3] == ["a", "0.001", "3"]


def test_the_best_stands_first_by_held_out_loss(runs):
    assert [run.name for run in rank(runs, None)[1]] == ["b", "a"]
    assert [run.name for run in rank(runs, "loss")[1]] == ["a", "b"]
    assert [run.name for run in rank(runs, "loss", highest=True)[1]] == ["b", "a"]


def test_a_run_without_held_out_loss_is_compared_by_training_loss(tmp_path, runs):
    make_run(tmp_path / "c", 3e-3, [1.0])
    found = [summarize(folder) for folder in find_runs([tmp_path])]
    metric, ranked = rank(found, None)
    assert metric == "loss (mean of 50)" and ranked[0].name == "c"
    with pytest.raises(ConfigError, match="no run has the metric 'speed'"):
        rank(found, "speed")


def test_a_loss_that_is_not_finite_comes_last_and_the_page_is_drawn(tmp_path, runs):
    make_run(tmp_path / "c", 3e-3, [5.0, float("nan")], float("nan"))
    found = [summarize(folder) for folder in find_runs([tmp_path])]
    metric, ranked = rank(found, "eval/loss")
    assert ranked[-1].name == "c"
    assert "<svg" in write_comparison_page(ranked, metric)


def test_the_same_run_given_twice_counts_once_and_what_is_none_is_named(tmp_path, runs):
    assert len(find_runs([tmp_path, tmp_path / "a"])) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])


def test_the_smooth_line_begins_at_the_first_point():
    assert smooth([(1, 4.0), (2, 4.0)]) == [(1, 4.0), (2, pytest.approx(4.0))]
    assert [x for x, _ in smooth([(1, 4.0), (2, float("nan")), (3, 2.0)])] == [1, 3]


def test_a_long_setting_is_shown_by_what_its_parts_begin_with(tmp_path):
    assert shorten([{"action": "skip", "budget": 3}, {"action": "rollback"}]) == "[skip, rollback]"
    assert shorten("x" * 70) == "x" * 59 + "\u2026" and shorten(0.5) == "0.5"
