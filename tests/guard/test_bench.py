"""`python -m tools.bench guard`: what it makes of runs, and bad arguments; the runs themselves are a command's work."""

import json

import pytest

import tools.bench
from megalm.config import ConfigError
from tests.small_run import write_corpus
from tools.bench.guard import _cost as _guard_cost
from tools.bench.guard import _recipes as _guard_recipes
from tools.subcommands import run_tool


def event(kind, step, **fields):
    return {"time": 0.0, "kind": kind, "step": step, "onset": step, "cause": "weights", **fields}


def outcome(events, loss=3.0):
    return {"status": 0, "loss": loss, "events": events}


def test_a_row_tells_the_last_verdict_and_the_regret():
    events = [
        event("provoke", 360, what="bit_flip"),
        event("spike", 361),
        event("replay", 361, to_step=352),
        event("recovered", 352, seconds=0.03),
        event("verdict", 361, cause="hardware", ranks=[0]),
    ]
    row = _guard_recipes._row("bit_flip", 1, outcome(events, 3.01), outcome([], 3.0))
    assert (row["verdict"], row["right"], row["delay"], row["rollback_s"]) == ("hardware", True, 1, 0.03)
    assert row["regret"] == pytest.approx(0.01) and row["replays"] == 1 and row["rollbacks"] == 0
    blind = _guard_recipes._row("one_bad_batch", 2, outcome([], 3.3), outcome([], 3.0))
    assert blind["verdict"] == "none" and not blind["right"] and blind["delay"] is None
    layouts = [
        {"recipe": "bit_flip", "layout": name, "decisions": _guard_recipes._decisions([outcome(part)])}
        for name, part in (("one process", events), ("dp=2", events), ("tp=2", events[:-1]))
    ]
    text = _guard_recipes.write_recipe_tables({"provoked": [row, blind], "layouts": layouts})
    assert "right verdicts: 1 of 2 (50%)" in text and "within 0.02 nats of the twin: 1 of 2" in text
    assert "dp=2, tp=2: DIFFERENT" in text
    assert "identical" in _guard_recipes.write_recipe_tables({"provoked": [], "layouts": layouts[:2]})


def test_the_cost_has_its_parts():
    row = {"shape": "tiny", "steps": 8, "step_s": 0.2, "parts_s_per_step": {"observe": 0.0001, "snapshots": 0.0005}}
    text = _guard_cost.write_cost_tables(
        [{**row, "share": 0.003, "paired_share": 0.004, "paired_error": 0.002, "return_s": 0.02}]
    )
    assert "0.30%" in text and "+0.40% +- 0.20%" in text and "snapshots 0.50 ms" in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--provoked", "--recipes", "quake"], ["quake", "bit_flip"]),
        (["--provoked", "--data", "nowhere/text"], ["nowhere/text", "make data"]),
        (["--detection", "--curves", "nowhere"], ["nowhere"]),
        (["--provoked", "--seeds", "0"], ["--seeds 0"]),
    ],
)
def test_bad_arguments_are_explained(capsys, arguments, says):
    assert run_tool(tools.bench, ["guard", *arguments]) == 2
    err = capsys.readouterr().err
    assert all(text in err for text in says) and "Traceback" not in err


def test_results_are_on_the_disk_as_they_come(tmp_path):
    from tools.bench.guard.guard import _write

    path = tmp_path / "a" / "guard.json"
    for result in ({"cost": []}, {"cost": [], "provoked": {"provoked": []}}):
        _write(path, result)
        assert json.loads(path.read_text()) == result
    assert list(path.parent.iterdir()) == [path]


def test_an_attached_run_is_the_product_as_a_user_starts_it(tmp_path):
    data = write_corpus(tmp_path, vocab_size=64)
    small = [
        "model.num_layers=1",
        "model.hidden_size=32",
        "model.num_kv_heads=4",
        "model.ffn_hidden_size=64",
        "model.vocab_size=64",
    ]
    small += ["train.steps=3", "checkpoint.every=0", "model.seq_length=32", "train.eval_sequences=4"]
    (outcome,) = _guard_recipes._launch(str(tmp_path / "twin-1-"), "twin", data, 1, "", 1, 1, small)
    assert outcome["status"] == 0 and 0 < outcome["loss"] < 5 and outcome["events"][0]["kind"] == "start"
    assert all((tmp_path / "twin-1-" / name).exists() for name in ("report.html", "tensorboard", "metrics.jsonl"))
    with pytest.raises(ConfigError, match="the undisturbed run of seed 1 ended with 2.*num_heads"):
        _guard_recipes._launch(str(tmp_path / "twin-1-"), "twin", data, 1, "", 1, 1, [*small, "model.num_heads=5"])


def test_a_run_that_fell_is_a_row_with_its_last_words():
    fallen = {"status": 1, "loss": float("nan"), "events": [], "said": ["ValueError: no number"]}
    row = _guard_recipes._row("bit_flip", 1, fallen, outcome([], 3.0))
    text = _guard_recipes.write_recipe_tables({"provoked": [row], "layouts": []})
    assert "it ended with status 1:" in text and "ValueError: no number" in text and "worst NaN" in text
