"""Ten faults planted in a clean set, each found; the clean set itself is silent."""

import json
import random

import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.evaluate.item import Item, Task
from megalm.evaluate.lint import lint_file, lint_task
from tests.texts import WORDS


def clean(count=100, seed=3):
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        choices = [f"{word} {rng.choice(WORDS)}" for word in rng.sample(WORDS, 4)]
        choices = [choice.ljust(9, "x")[:9] for choice in choices]
        rows.append(
            {"query": f"Question {i}: {''.join(rng.choices('qzvk ', k=30))}?", "choices": choices, "gold": i % 4}
        )
    return rows


def findings(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {finding.check: finding for finding in lint_file(tmp_path / "rows.jsonl").findings}


def plant_position(rows):
    for row in rows[:60]:
        row["choices"].insert(0, row["choices"].pop(row["gold"]))
        row["gold"] = 0


def plant_majority(rows):
    for row in rows[:60]:
        row["choices"][row["gold"]] = "no reason"


def plant_longest(rows):
    for row in rows[:60]:
        row["choices"][row["gold"]] += " indeed"


def plant_inside(rows):
    rows[6]["query"] += f" (it is {rows[6]['choices'][rows[6]['gold']]})"


def plant_equal(rows):
    rows[9]["choices"][3] = rows[9]["choices"][0]


def plant_repeated(rows):
    rows.append(dict(rows[4]))


def plant_other_answer(rows):
    rows.append({**rows[4], "gold": (rows[4]["gold"] + 1) % 4})


def plant_broken(rows):
    rows[2]["gold"] = 4


def plant_empty(rows):
    rows[3]["choices"][1] = " "


def plant_blanks(rows):
    rows[5]["choices"][2] = " " + rows[5]["choices"][2]


PLANTED = {
    "answer position": (plant_position, ()),
    "majority answer": (plant_majority, ()),
    "longest choice": (plant_longest, ()),
    "answer in the prompt": (plant_inside, (7,)),
    "equal choices": (plant_equal, (10,)),
    "repeated prompts": (plant_repeated, (5, 101)),
    "same prompt, other answer": (plant_other_answer, (5, 101)),
    "broken item": (plant_broken, (3,)),
    "empty text": (plant_empty, (4,)),
    "uneven blanks": (plant_blanks, (6,)),
}


def test_a_clean_set_is_silent(tmp_path, capsys):
    assert findings(tmp_path, clean()) == {}
    assert main(["evaluate", "lint", "smoke"]) == 0
    assert capsys.readouterr().out.count("nothing found") == 6


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_fault_is_found(check, tmp_path):
    plant, items = PLANTED[check]
    rows = clean()
    plant(rows)
    found = findings(tmp_path, rows)
    assert found[check].items == items
    expected = {check} | ({"uneven blanks"} if check == "empty text" else set())
    assert set(found) == expected, "and nothing else is"


def test_an_always_first_answer_says_what_a_model_with_equal_scores_gets(tmp_path):
    rows = clean()
    for row in rows:
        row["gold"] = 0
    assert "in 100 of 100" in findings(tmp_path, rows)["answer position"].text
    assert "gets 100%" in findings(tmp_path, rows)["answer position"].text


def test_a_claimed_chance_is_compared_with_the_choices():
    items = tuple(Item("choice", (f"q{i}",), ("aa", "bb"), (i % 2,)) for i in range(10))
    (finding,) = [f for f in lint_task(Task("t", "choice", items, chance=1 / 3)) if f.check == "claimed chance"]
    assert finding.text == "33.3% is claimed, the file's choices make 50.0%"


def test_examples_and_stops():
    items = tuple(Item("generate", (f"q{i}",), ("one\ntwo" if i == 1 else "one",)) for i in range(3))
    found = lint_task(Task("t", "generate", items, shots=items[2:], stop=("\n",)))
    assert {f.check: f.items for f in found} == {"example is the item": (3,), "stop in the answer": (2,)}


def test_a_page_on_which_the_items_can_be_read(tmp_path, capsys):
    rows = clean()
    plant_equal(rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "lint", str(tmp_path / "rows.jsonl"), "--html", str(tmp_path / "page.html"), "--json"]
    assert main(words) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["findings"] == [
        {"check": "equal choices", "text": "1 of 100 items have a choice twice", "count": 1, "items": [10]}
    ]
    page = (tmp_path / "page.html").read_text()
    assert "equal choices" in page and "Question 99" in page


def test_a_file_without_items(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="no line has choices"):
        lint_file(tmp_path / "rows.jsonl")
