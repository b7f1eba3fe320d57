"""`megalm filter` from files to files: what is written, whatever the workers, after an interruption, and of bad input."""

import json
import os
import signal

import pytest

from megalm.corpus import documents as documents_module
from megalm.corpus.dedup import stages as stages_module
from tests.corpus.filter.test_decisions import pages
from tools.filter.__main__ import main


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 9000)  # several shards
    path = tmp_path / "in.jsonl"
    rows = [{"id": number, "text": text, "meta": {"lang": "en"}} for number, text in enumerate(pages(80))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def filtered(source, tmp_path, *options, rules="fineweb", name="kept", status=0):
    kept, gone = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.gone.jsonl"
    command = [str(source), "--rules", rules, "--output", str(kept), "--dropped", str(gone), "--workers", "1", *options]
    assert main(command) == status
    return kept, gone


def test_what_stays_and_what_goes_with_rule_value_and_scores(source, tmp_path, capsys):
    kept, gone = filtered(source, tmp_path, rules="gopher_quality")
    stays, drops, texts = rows(kept), rows(gone), pages(80)
    assert len(stays) + len(drops) == 80 and len(stays) > 5 and len(drops) > 5
    assert all(row["text"] == texts[row["id"]] and row["meta"] == {"lang": "en"} for row in stays)
    assert all(row["filter"]["kept"] and row["filter"]["rule"] is None for row in stays)
    assert all(row["filter"]["scores"]["plain_words"] >= 50 for row in stays)
    short = [row for row in drops if row["rule"] == "gopher_short_doc"]
    assert short and all(row["value"] == row["scores"]["plain_words"] < 50 for row in short)
    with open(source, "rb") as file:
        file.seek(int(short[0]["place"].split()[1]))
        assert json.loads(file.readline())["text"]
    assert f"{len(stays)} stay" in capsys.readouterr().out


def test_edits_reach_the_output_and_labels_leave_the_text(source, tmp_path):
    kept, _ = filtered(source, tmp_path, rules="c4")
    texts = pages(80)
    assert any(row["text"] != texts[row["id"]] for row in rows(kept))
    labelled, _ = filtered(source, tmp_path, "--label-only", rules="c4", name="all")
    assert [row["text"] for row in rows(labelled)] == texts
    assert {row["id"] for row in rows(labelled) if row["filter"]["kept"]} == {row["id"] for row in rows(kept)}


def test_without_a_column_lines_stay_as_they_are(source, tmp_path):
    kept, _ = filtered(source, tmp_path, "--column", "", rules="gopher_quality")
    assert set(kept.read_text().splitlines()) <= set(source.read_text().splitlines())


def test_a_column_that_is_there_is_replaced(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one two", "filter": 1}\n{"text": "three"}\n{}\n'.replace("{}\n", '"alone"\n'))
    (tmp_path / "r.yaml").write_text("rules:\n- {score: words}\n")
    kept, _ = filtered(path, tmp_path, rules=str(tmp_path / "r.yaml"))
    assert [row["filter"]["scores"] for row in rows(kept)] == [{"words": 2}, {"words": 1}, {"words": 1}]
    assert rows(kept)[2]["text"] == "alone"


@pytest.mark.parametrize("workers", ["2", "3"])
def test_the_same_bytes_whatever_the_workers(source, tmp_path, workers):
    one = filtered(source, tmp_path)
    more = filtered(source, tmp_path, "--workers", workers, name="more")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in more]
    assert not list(tmp_path.glob("*.parts"))


def test_a_killed_run_goes_on_with_the_same_bytes(source, tmp_path, capsys):
    one = filtered(source, tmp_path, name="whole")
    child = os.fork()
    if child == 0:
        done, real = 0, stages_module._call

        def call(task):
            nonlocal done
            done += 1
            if done == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(task)

        stages_module._call = call
        filtered(source, tmp_path)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and (tmp_path / "kept.jsonl.parts").exists()
    assert not (tmp_path / "kept.jsonl").exists()
    again = filtered(source, tmp_path)
    assert "going on with an interrupted run" in capsys.readouterr().err
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in again]


def test_other_formats_and_fields(tmp_path):
    (tmp_path / "a.csv").write_text('body,n\n"one two three",1\nfour,2\n')
    (tmp_path / "b.txt").write_text("a text of five words\n")
    (tmp_path / "r.yaml").write_text("rules:\n- {score: words, at_least: 2}\n")
    kept, _ = filtered(tmp_path / "a.csv", tmp_path, "--field", "body", rules=str(tmp_path / "r.yaml"))
    assert [(row["body"], row["n"], row["filter"]["scores"]["words"]) for row in rows(kept)] == [
        ("one two three", "1", 3)
    ]
    kept, _ = filtered(tmp_path / "b.txt", tmp_path, rules=str(tmp_path / "r.yaml"))
    assert rows(kept)[0]["text"] == "a text of five words\n"


def test_bad_documents_are_named_or_listed(source, tmp_path, capsys):
    with open(source, "ab") as file:
        file.write(b'{"text": broken\n')
    filtered(source, tmp_path, status=2)
    assert "not JSON" in capsys.readouterr().err
    _, gone = filtered(source, tmp_path, "--skip-bad")
    assert [row for row in rows(gone) if row["rule"] == "cannot be read"][0]["reason"].startswith("not JSON")
    assert "skipped as bad: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.jsonl"], "give --rules"),
        (["--rules", "c4"], "give the INPUT"),
        (["x.jsonl", "--rules", "c4", "--label-only"], "--label-only writes"),
        (
            ["{source}", "--rules", "c4", "--field", "{{id}} {{text}}", "--output", "{folder}/o.jsonl"],
            "name a single field",
        ),
        (["{source}", "--rules", "c4", "--output", "{source}"], "is an input"),
        (["{source}", "--rules", "fineweb-edu-like"], "in.jsonl: a rule asks for the field 'score'"),
    ],
)
def test_wrong_commands_are_told_in_words(source, tmp_path, capsys, words, message):
    command = [word.format(source=source, folder=tmp_path) for word in words]
    assert main([*command, "--workers", "1"]) == 2
    assert message in capsys.readouterr().err


def test_the_list_of_presets_and_scores(capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "fineweb" in shown and "mean_word_length" in shown and "sentences" in shown
