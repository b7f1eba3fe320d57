"""`megalm evaluate MODEL`, as a person calls it."""

import json

import pytest

from megalm.__main__ import main
from tests.evaluate.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model")))


def evaluate(*words):
    return main(["evaluate", *map(str, words)])


def test_a_smoke_report_with_errors_hashes_and_every_item(model, tmp_path, capsys):
    assert evaluate(model, "--output", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "smoke by the protocol core" in shown and "facts" in shown and "±" in shown
    content = json.loads((tmp_path / "results.json").read_text())
    assert {task["task"]: task["items"] for task in content["tasks"]}["facts"] == 32
    facts = content["tasks"][0]
    assert facts["protocol"] == "core" and facts["figures"]["acc"]["stderr"] > 0
    assert len(facts["prompts_sha256"]) == len(facts["data_sha256"]) == 64 and len(content["model"]) == 32
    lines = (tmp_path / "facts.jsonl").read_text().splitlines()
    assert len(lines) == 33 and len(json.loads(lines[1])["log_probabilities"]) == 4


def test_what_was_computed_is_not_computed_again(model, tmp_path, capsys):
    assert evaluate(model, "--output", tmp_path, "--task", "facts", "--limit", 4) == 0
    before = (tmp_path / "facts.jsonl").read_bytes()
    capsys.readouterr()
    assert evaluate(model, "--output", tmp_path, "--limit", 4) == 0
    shown = capsys.readouterr().out
    assert shown.count("(from before)") == 1 and (tmp_path / "facts.jsonl").read_bytes() == before
    evaluate(model, "--output", tmp_path, "--limit", 5)
    assert "(from before)" not in capsys.readouterr().out


def test_a_torn_file_is_computed_again(model, tmp_path, capsys):
    assert evaluate(model, "--output", tmp_path, "--task", "facts", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    file = tmp_path / "facts.jsonl"
    file.write_text(file.read_text()[:-200])
    assert evaluate(model, "--output", tmp_path, "--task", "facts", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == first["tasks"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--suite", "nothing"], "suite 'nothing': neither one of"),
        (["--limit", "0"], "--limit=0 must be at least 1"),
        (["--batch-tokens", "0"], "--batch-tokens=0 must be at least 1"),
    ],
)
def test_wrong_words_end_with_one_sentence(model, tmp_path, capsys, words, message):
    assert evaluate(model, "--output", tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert evaluate(tmp_path) == 2
    assert "neither a run of megalm's" in capsys.readouterr().err
