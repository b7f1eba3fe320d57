"""A run that nothing happens to: what it writes and says from its start to its end, and when it goes on."""

import json

from tests.assembled.runs import json_lines, train

FILES = ("config.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "report.html", "tensorboard", "logs/rank-0.log")


def test_a_run_leaves_its_files_and_goes_on_where_it_stopped(tmp_path):
    first = train(tmp_path, "train.steps=4").ended_well()
    assert [record["step"] for record in first.records] == [1, 2, 3, 4]
    assert all((first.folder / name).exists() for name in FILES)
    assert [event["step"] for event in first.of("checkpoint")] == [3, 4]
    assert not first.of("spike") and first.of("start")[0]["world_size"] == 1
    assert "measured" in json.loads((first.folder / "plan.json").read_text())
    assert "<svg" in first.report and "step      3/4" in first.shown

    second = train(tmp_path, "train.steps=7").ended_well()
    assert "resumed at step 4 of 7" in second.shown
    assert [record["step"] for record in json_lines(second.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert len(second.of("start")) == 2 and "ended with status 0 at step 7" in second.log()
