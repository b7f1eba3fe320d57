"""Evaluation items planted in training text, of 20 to 200 characters, in other case, punctuation and white space."""

import json
import random

import pytest

from tests.corpus.dedup.test_dedup_scripts import CHINESE
from tools.dedup.__main__ import main

VOCABULARY = [
    "".join(random.Random(seed).choices("abcdefghijklmnoprstuvwy", k=random.Random(seed + 1).randrange(2, 9)))
    for seed in range(0, 8000, 2)
]


def make_item(rng, script):
    """A text of 20 to 200 characters."""
    wanted = rng.randrange(20, 201)
    if script == "chinese":
        return "".join(rng.choices(CHINESE, k=wanted))
    words = []
    while len(" ".join(words)) < wanted:
        words.append(rng.choice(VOCABULARY) + rng.choice(["", "", "", "'s", ",", " don't"]))
    return " ".join(words)[:200]


def disguise(rng, item):
    """The item in another case, with other punctuation and white space, and straight or curly or no apostrophes."""
    item = rng.choice([str.upper, str.title, str.lower])(item)
    item = item.replace("'", rng.choice(["'", "’", ""])).replace(",", rng.choice([",", ";", " -", ""]))
    item = item.replace(" ", rng.choice([" ", "  ", "\n", "\t "]))
    return rng.choice(["", "«", "(", "1. "]) + item + rng.choice(["", "?", "...", "»"])


def fill(rng, script, words):
    """Text that holds no item."""
    units = list(CHINESE) if script == "chinese" else [word + " " for word in VOCABULARY]
    return "".join(rng.choices(units, k=words))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder, rows of training text with the number of the item that each holds, or None)"""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(3)
    scripts = ["english", "chinese"] * 100
    items = [make_item(rng, script) for script in scripts]
    rows = []
    for number, (item, script) in enumerate(zip(items, scripts, strict=True)):
        before, after = fill(rng, script, 60), fill(rng, script, 60)
        rows.append((before + " " + disguise(rng, item) + " " + after, number))
        rows.append((before[: len(before) // 2] + after, None))
        # the first half of a short item, with another end, is none
        part = item[: min(len(item) // 2, 12 if script == "chinese" else 40)]
        rows.append((before + " " + part + "x " + after, None))
    rng.shuffle(rows)
    write(folder / "in.jsonl", [text for text, _ in rows])
    write(folder / "first.jsonl", items[:120])
    write(folder / "second.jsonl", [*items[120:], "too short"])
    return folder, rows


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def search(folder, capsys, *options, name="gone"):
    evaluation = [str(folder / "first.jsonl"), str(folder / "second.jsonl")]
    command = [
        "against",
        str(folder / "in.jsonl"),
        "--evaluation",
        *evaluation,
        "--removed",
        str(folder / name),
        "--json",
    ]
    assert main([*command, "--workers", "1", *options]) == 0
    return json.loads(capsys.readouterr().out), {json.loads(line)["number"] for line in (folder / name).open()}


def test_recall_and_precision(planted, capsys):
    folder, rows = planted
    answer, gone = search(folder, capsys)
    truth = {number for number, (_, item) in enumerate(rows) if item is not None}
    assert len(gone & truth) / len(truth) >= 0.98
    assert len(gone & truth) / len(gone) >= 0.99
    first, second = answer["benchmarks"]
    assert (first["items"], second["items"], answer["evaluation_documents_too_short"]) == (120, 81, 1)
    assert first["found"] >= 0.98 * 120 and second["found"] >= 0.98 * 80
    assert first["training_documents"] >= first["found"] and first["name"].endswith("first.jsonl")


def test_what_is_named_is_the_item(planted, capsys):
    folder, rows = planted
    search(folder, capsys)
    named = [json.loads(line) for line in (folder / "gone").open()]
    right = sum(row["evaluation"]["number"] == rows[row["number"]][1] for row in named)
    assert right >= 0.98 * len(named)


def test_the_same_whatever_the_workers(planted, capsys):
    folder, _ = planted
    one = search(folder, capsys)
    more = search(folder, capsys, "--workers", "2", name="more")
    assert one == more and (folder / "gone").read_bytes() == (folder / "more").read_bytes()


def test_items_below_so_many_characters_are_not_looked_for(tmp_path, capsys):
    write(tmp_path / "in.jsonl", ["what a lovely day it is", "nothing at all"])
    write(tmp_path / "first.jsonl", ["A lovely day!"])
    write(
        tmp_path / "second.jsonl",
        ["there are thirteen words in this sentence so that it is long enough to be searched"],
    )
    assert search(tmp_path, capsys)[1] == set()
    assert search(tmp_path, capsys, "--characters", "10")[1] == {0}
    write(tmp_path / "second.jsonl", ["short"])
    command = ["--against", str(tmp_path / "first.jsonl"), str(tmp_path / "in.jsonl"), "--workers", "1"]
    assert main(command) == 2 and "--characters" in capsys.readouterr().err
    assert main([*command, "--characters", "10"]) == 0
    assert "first.jsonl: 1 of 1 documents found (100.0%)" in capsys.readouterr().out
