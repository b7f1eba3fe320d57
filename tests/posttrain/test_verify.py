"""Models asked the same prompts: scores, answers beside each other, and what cannot be judged."""

import json

import pytest

from megalm.posttrain.example import write_example
from tests.assembled.runs import train
from tools.posttrain.__main__ import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an example and a run of two steps over bytes."""
    folder = tmp_path_factory.mktemp("verify")
    example = write_example(folder, instructions=20)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} {n + 1} {n + 2}"}) + "\n" for n in range(400)))
    from tools.tokenize.__main__ import main as tokenize

    assert tokenize([str(text), "--tokenizer", str(example.tokenizer), "--output", str(folder / "text")]) == 0
    words = ["model.vocab_size=264", "model.seq_length=64", f"data.train=[{folder}/text_text_document]"]
    train(folder, *words, f"data.tokenizer={example.tokenizer}", "train.steps=2", "train.sample=false").ended_well()
    return folder, example


def run_of(folder):
    return next(path.parent for path in folder.rglob("config.yaml") if path.parent.name != "configs")


def test_answers_of_two_models_stand_beside_each_other_with_their_scores(made, tmp_path, capsys):
    folder, example = made
    run, page = str(run_of(folder)), tmp_path / "page.html"
    words = ["--prompts", str(example.held_out), str(example.other_held_out), "--max-tokens", "8", "--html", str(page)]
    assert main(["verify", run, run, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(score["prompts"], score["count"]) for score in found["scores"]] == 2 * [
        ("held_out", 10),
        ("other_held_out", 120),
    ]
    assert len(found["answers"]) == 130 and all(0 <= score["low"] <= score["mean"] <= 1 for score in found["scores"])
    assert "user: " in page.read_text()
    assert main(["verify", run, *words]) == 0
    assert "held_out: user: " in capsys.readouterr().out


def test_what_cannot_be_judged_or_read_is_named(made, tmp_path, capsys):
    folder, example = made
    run = str(run_of(folder))
    lacks = tmp_path / "lacks.jsonl"
    lacks.write_text('{"prompt": "1+1="}\n')
    for words, said in (
        ([run, "--prompts", str(lacks)], "lacks.jsonl line 1: the prompt '1+1=': the reward exact compares with"),
        ([str(tmp_path / "nowhere"), "--prompts", str(example.sums)], "nowhere"),
        ([run, "--prompts", str(example.sums), "--rewards", "nowhere.py:f"], "there is no file nowhere.py"),
        ([run, "--prompts", str(example.sums), "--max-tokens", "60"], "rollout.max_tokens"),
    ):
        assert main(["verify", *words]) == 2
        assert said in capsys.readouterr().err
