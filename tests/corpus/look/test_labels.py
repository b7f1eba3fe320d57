"""Labels are lines that are never lost, and a list for the filter."""

import json

import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.look.labels import Labels, make_key, read_labels
from tools.filter.__main__ import main


def test_the_last_line_of_a_text_counts_and_null_takes_a_label_back(tmp_path):
    labels = Labels(tmp_path / "deep" / "labels.jsonl")
    for key, label in (("a", "bad"), ("b", "bad"), ("a", "good"), ("b", None)):
        labels.give(key, label, f"text {key}", "place")
    assert labels.counts() == {"good": 1} and [one.key for one in labels.of_label("good")] == ["a"]
    assert len(list(read_labels(labels.path))) == 4, "nothing is ever taken out of the file"
    assert Labels(labels.path).counts() == {"good": 1}


def test_a_line_that_a_crash_cut_off_anywhere_spoils_no_other(tmp_path):
    path = tmp_path / "labels.jsonl"
    labels = Labels(path)
    for key, text in (("a", "first"), ("b", 'ends in "}" and \u00e9')):
        labels.give(key, "bad", text, "place")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = (cut >= first - 1) + (cut >= len(whole) - 1)  # a line without its end is whole
        assert Labels(path).counts() == ({"bad": kept} if kept else {}), cut
        Labels(path).give("c", "good", "behind", "place")
        assert Labels(path).counts() == ({"bad": kept} if kept else {}) | {"good": 1}, cut


def test_zeros_that_a_lost_power_left_spoil_no_label(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(bytes(70))
    Labels(path).give("c", "good", "behind", "place")
    assert Labels(path).counts() == {"good": 1}


@pytest.mark.parametrize("label", ["", "  ", "x" * 41, "a/b", "a\nb"])
def test_a_label_that_is_none_is_refused_and_not_written(tmp_path, label):
    labels = Labels(tmp_path / "labels.jsonl")
    with pytest.raises(ConfigError, match="printable characters without a slash"):
        labels.give("a", label, "text", "place")
    assert not labels.path.exists()


@pytest.mark.parametrize("content", ['{"text": "one"}\n{"text": "two"}\n', '{"text": "one"}', "words", "[1]\n", "7"])
def test_another_file_is_no_list_of_labels(tmp_path, content):
    (tmp_path / "other.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="line 1 is no label"):
        Labels(tmp_path / "other.jsonl")


def test_the_filter_drops_what_was_labelled_wherever_it_lies(tmp_path, capsys):
    texts = [f"text number {n}" for n in range(6)]
    labels = Labels(tmp_path / "labels.jsonl")
    for n, label in ((1, "bad"), (3, "spam"), (4, "bad"), (4, "good")):
        labels.give(make_key(texts[n]), label, texts[n], "elsewhere")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    rules = tmp_path / "rules.yaml"
    output = str(tmp_path / "out.jsonl")
    words = [str(tmp_path / "in.jsonl"), "--rules", str(rules), "--output", output]
    rules.write_text("rules:\n  - {labels: labels.jsonl, drop: [bad, spam]}\n")
    assert main(words) == 0
    assert [json.loads(line)["text"][-1] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        "5",
        "4",
        "2",
        "0",
    ]
    for rule, said in (
        ("- {edit: repair}\n  - {labels: labels.jsonl}", "before every `edit`"),
        ("- {labels: nowhere.jsonl}", "there is no file"),
        ("- {labels: labels.jsonl, drop: [worse]}", "no text in"),
    ):
        rules.write_text(f"rules:\n  {rule}\n")
        assert main([*words[:-1], f"{output}.2.jsonl"]) == 2
        assert said in capsys.readouterr().err
