"""Suites and their files: what is shipped, what is read, and how what is wrong is said."""

import json

import pytest

from megalm.config.errors import ConfigError
from megalm.evaluate.tasks.rows import read_items
from megalm.evaluate.tasks.suite import read_suite


def test_the_smoke_suite_is_about_a_hundred_items_of_every_kind():
    suite = read_suite("smoke")
    assert sum(len(task.items) for task in suite.tasks) == 104
    assert {task.kind for task in suite.tasks} == {"choice", "schema", "cloze", "text", "generate"}
    for task in suite.tasks:
        if task.kind in ("choice", "schema"):
            counts = [sum(item.gold == (n,) for item in task.items) for n in range(len(task.items[0].options))]
            assert max(counts) - min(counts) <= 1, "no answer's position may be likelier"


WRONG = [
    ("choice", {"query": "a", "choices": ["b"], "gold": 1}, "'gold' is 1, it must be a number from 0 to 0"),
    ("choice", {"query": "a", "choices": "bc", "gold": 0}, "'choices' is 'bc', it must be a list of texts"),
    ("choice", {"choices": ["b"], "gold": 0}, "'query' is None, it must be a text"),
    ("cloze", {"context": "a", "continuation": " "}, "there is nothing to predict"),
    ("schema", {"context_options": ["a", "b"], "continuation": "c", "gold": True}, "'gold' is True"),
    ("generate", {"context": "a", "answer": 4}, "'answer' is 4"),
]


@pytest.mark.parametrize("kind,row,message", WRONG)
def test_a_broken_item_is_named_by_line_and_field(tmp_path, kind, row, message):
    good = {
        "query": "q",
        "choices": ["a", "b"],
        "gold": 0,
        "context_options": ["a"],
        "continuation": "c",
        "answer": "d",
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**good, "context": "x"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError) as raised:
        read_items(file, kind)
    assert "rows.jsonl, line 3" in str(raised.value) and message in str(raised.value)


def test_a_line_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        read_items(tmp_path / "rows.jsonl", "text")


def test_a_suite_in_the_gauntlets_form(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"context": "1 + 1 =", "continuation": "2"}\n' * 3)
    entry = "{label: sums, dataset_uri: own.jsonl, icl_task_type: language_modeling, num_fewshot: [2], category: maths}"
    (tmp_path / "suite.yaml").write_text(f"icl_tasks:\n  - {entry}\n")
    (task,) = read_suite(str(tmp_path / "suite.yaml")).tasks
    assert (task.name, task.kind, task.num_fewshot, task.category, len(task.items)) == ("sums", "cloze", 2, "maths", 3)


def test_data_that_is_not_there_is_listed(tmp_path):
    entry = "{label: sums, dataset_uri: away.jsonl, icl_task_type: text}"
    (tmp_path / "suite.yaml").write_text(f"icl_tasks:\n  - {entry}\n")
    with pytest.raises(
        ConfigError, match="1 of 1 tasks lack their data: .*away.jsonl. To get them: put the files there"
    ):
        read_suite(str(tmp_path / "suite.yaml"))


@pytest.mark.parametrize(
    "name,task,message",
    [
        ("smokes", None, "neither one of .*smoke.*, nor a file"),
        ("smoke", "fact", "there is no task 'fact'; there are facts, endings"),
    ],
)
def test_a_name_that_nothing_has(name, task, message):
    with pytest.raises(ConfigError, match=message):
        read_suite(name, only=[task] if task else [])


def test_a_single_file_says_its_kind(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"context_options": ["a", "b"], "continuation": "c", "gold": 1}\n')
    (task,) = read_suite(str(tmp_path / "mine.jsonl")).tasks
    assert (task.name, task.kind, task.baseline()) == ("mine", "schema", 0.5)


def test_the_chances_of_cores_bundle_are_taken(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\nboolq,x,62.0\n")
    entry = "{label: boolq, dataset_uri: own.jsonl, icl_task_type: multiple_choice, num_fewshot: [0]}"
    (tmp_path / "core.yaml").write_text(f"icl_tasks:\n  - {entry}\n")
    assert read_suite(str(tmp_path / "core.yaml")).tasks[0].baseline() == pytest.approx(0.62)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random\nboolq,62.0\n")
    with pytest.raises(ConfigError, match="needs the columns 'Eval Task' and 'Random baseline'"):
        read_suite(str(tmp_path / "core.yaml"))
