"""Repeated spans of bytes are cut out of texts, in whole characters."""

import gzip
import json

import numpy as np
import pytest

import tools.dedup
from megalm.corpus import documents as documents_module
from megalm.corpus.dedup import spans as spans_module
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.dedup.text_spans import cut_repeated_text
from tests.texts import sentences
from tools.subcommands import run_tool


def cut_by_definition(texts, length):
    """What is left, in plain Python: bytes in a window that occurred before, without an overlap with its first place."""
    seen, left, at = {}, [], 0
    for text in texts:
        data = text.encode()
        cut = np.zeros(len(data) + 1, bool)
        for i in range(len(data) - length + 1):
            first = seen.setdefault(data[i : i + length], at + i)
            if at + i >= first + length:
                cut[i : i + length] = True
        for i in range(1, len(data)):  # a character that is cut in part stays whole
            if data[i] & 0xC0 == 0x80:
                begin = i
                while data[begin] & 0xC0 == 0x80:
                    begin -= 1
                if not cut[begin : i + 1].all():
                    cut[begin : i + 1] = False
        left.append(bytes(np.frombuffer(data, np.uint8)[~cut[:-1]]))
        at += len(data)
    return left


@pytest.mark.parametrize("chunk", [None, 300])
def test_the_bytes_that_are_cut_are_those_of_the_definition(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 3000)
    pool = [sentences(i, 2) + " — naïve 日本語 🙂 " for i in range(8)]
    texts = [sentences(100 + i, 1) + pool[i % 8] + sentences(200 + i, 1) + pool[(3 * i) % 8] for i in range(30)]
    texts += [pool[1], "é日" * 40, "", "unlike the others"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    output, removed = tmp_path / "out", tmp_path / "gone"
    with Corpus([str(path)]) as corpus:
        assert len(corpus.shards) > 2
        cuts = cut_repeated_text(corpus, 30, str(output), str(removed), chunk)
    left = cut_by_definition(texts, 30)
    kept = {row["n"]: row["text"].encode() for row in map(json.loads, output.read_text().splitlines())}
    assert kept == {n: data for n, data in enumerate(left) if data.strip() or not texts[n]}
    assert cuts.bytes_cut == sum(len(t.encode()) for t in texts) - sum(map(len, left)) > 1000
    rows = [json.loads(line) for line in removed.read_text().splitlines()]
    assert sum(row["bytes"] for row in rows) == cuts.bytes_cut and len(rows) == cuts.spans
    for row in rows:
        mine, origin = texts[row["number"]].encode(), texts[row["duplicate_of"]["number"]].encode()
        shown = row["text"].encode()
        assert mine[row["offset"] :].startswith(shown) and row["bytes"] >= len(shown)
        there = origin[row["duplicate_of"]["offset"] :]
        assert there[:24] == mine[row["offset"] :][:24]


def test_lines_without_repeats_stay_as_they_are(tmp_path, capsys):
    text = sentences(1, 6)
    lines = [
        '{"id": 1.50, "meta": {"text": ' + json.dumps(text) + "}}",
        '{"meta":{"text":"of its own"},"x":"\\ud800"}',
        json.dumps({"meta": {"text": text + " more", "y": [1]}, "id": 2}),
        json.dumps({"meta": {"text": text}, "id": 3}),
    ]
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    out, gone = tmp_path / "out.jsonl", tmp_path / "gone.jsonl"
    command = [
        "substring",
        str(path),
        "--bytes",
        "50",
        "--field",
        "meta.text",
        "--output",
        str(out),
        "--removed",
        str(gone),
    ]
    assert run_tool(tools.dedup, [*command, "--json", "--workers", "1", "--memory", "150"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["documents"], answer["documents_gone"], answer["spans"]) == (4, 1, 2)
    kept = out.read_text().splitlines()
    assert kept[:2] == lines[:2] and len(kept) == 3
    assert json.loads(kept[2]) == {"meta": {"text": " more", "y": [1]}, "id": 2}
    assert [json.loads(line)["number"] for line in gone.read_text().splitlines()] == [2, 3]


def test_plain_texts_and_bad_lines(tmp_path, capsys):
    text = sentences(3, 5)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("begin " + text + " end")
    (tmp_path / "c.jsonl").write_text('oops\n{"text": "short"}\n{"text": 5}\n')
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]
    command = ["substring", *inputs, "--bytes", "60", "--output", str(tmp_path / "out.jsonl"), "--workers", "1"]
    assert run_tool(tools.dedup, command) == 2
    assert "c.jsonl: byte 0: not JSON" in capsys.readouterr().err
    assert run_tool(tools.dedup, [*command, "--skip-bad", "--removed", str(tmp_path / "gone.jsonl")]) == 0
    said = capsys.readouterr().out
    assert (
        "1 repeated spans of 60 bytes" in said
        and "skipped as bad: 2" in said
        and "byte 23: field 'text' is int" in said
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [{"text": text}, {"text": "begin  end"}, {"text": "short"}]
    rows = [json.loads(line) for line in (tmp_path / "gone.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rows] == ["byte 0", "byte 0", "byte 23"]


def test_what_cannot_be_asked_for_is_explained(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    for arguments, message in (
        (["--bytes", "1"], "at least 2 bytes"),
        (["--bytes", "9", "--field", "{a} {b}"], "must be one key"),
        ([], "--bytes 200"),
        (["--bytes", "9", "--memory", "1"], "at least 130 (MB)"),
        (["--bytes", "9", "--output", str(path)], "is an input"),
    ):
        assert run_tool(tools.dedup, ["substring", str(path), "--workers", "1", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_touching_spans_of_two_documents_stay_apart(tmp_path):
    """A window may end where a document ends, and the next one begin there."""
    path = tmp_path / "in.jsonl"
    texts = ["abcdefghij", "klmnopqrst", "abcdefghij", "klmnopqrst"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with Corpus([str(path)]) as corpus:
        cuts = cut_repeated_text(corpus, 10, None, None)
    assert (cuts.spans, cuts.bytes_cut, cuts.documents_gone) == (2, 20, 2)
    assert spans_module.CHUNK > 20
