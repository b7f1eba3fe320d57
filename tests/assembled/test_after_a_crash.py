"""A run whose files a crash or a power cut has torn: the same command goes on."""

from megalm.config.saved import load_config
from tests.assembled.runs import json_lines, start, train


def test_a_run_goes_on_behind_torn_files(tmp_path):
    first = train(tmp_path, "train.steps=6").ended_well()
    events, metrics = first.folder / "events.jsonl", first.folder / "metrics.jsonl"
    events.write_bytes(events.read_bytes()[:-12])
    lines = metrics.read_bytes().split(b"\n")
    lines[1], lines[3] = b"\0" * 100, lines[3][:30]
    metrics.write_bytes(b"\n".join(lines) + "half a character: é".encode()[:-1])

    second = train(tmp_path, "train.steps=9").ended_well()
    assert "resumed at step 6 of 9" in second.shown
    assert "metrics.jsonl, line 4 is damaged" in second.errors and "line 4 is damaged" in second.log()
    assert [record["step"] for record in json_lines(metrics)] == [1, 3, 5, 6, 7, 8, 9]
    assert [event["step"] for event in json_lines(events) if event["kind"] == "checkpoint"] == [3, 9]

    (second.folder / "config.yaml").write_bytes(b"\0" * 200)
    status, _, errors = start("tools.guard", "samples", str(second.folder), "--step", "3")
    assert status == 2 and "Traceback" not in errors
    (second.folder / "plan.json").write_bytes(b'\xff\xfe{"')
    third = train(tmp_path, "train.steps=10").ended_well()  # the settings that count lie in the checkpoint
    assert "resumed at step 9 of 10" in third.shown
    assert load_config(second.folder / "config.yaml").train.steps == 10
