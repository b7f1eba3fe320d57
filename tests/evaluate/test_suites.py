"""Suites and their files: what is shipped, what is read, and how what is wrong is said."""

import json

import pytest
import yaml

from megalm.config.errors import ConfigError
from megalm.evaluate.answers import match_answer
from megalm.evaluate.measure import TaskResult
from megalm.evaluate.results import average
from megalm.evaluate.statistics import Estimate
from megalm.evaluate.tasks.rows import read_items
from megalm.evaluate.tasks.suite import SHIPPED, read_suite


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


ROWS = {
    "multiple_choice": {"query": "a", "choices": ["b", "c"], "gold": 0},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a", "continuation": "b", "category": "History, old"},
    "generation_task_with_answers": {"context": "a", "answer": "3", "chain_of_thought": "b"},
}


@pytest.fixture
def data(tmp_path):
    """Rows in place of every public set."""
    for suite in ("core", "gauntlet"):
        for entry in yaml.safe_load((SHIPPED / f"{suite}.yaml").read_text())["icl_tasks"]:
            path = tmp_path / entry["dataset_uri"]
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {**ROWS[entry["icl_task_type"]], "category": "History, old"}
            path.write_text("".join(json.dumps({**row, "category": c}) + "\n" for c in ("History, old", "law", "law")))
    return tmp_path


def test_core_has_its_22_tasks_and_chances(data):
    suite = read_suite("core", data)
    assert len(suite.tasks) == 22 and suite.protocol == "core"
    by_name = {task.name: task for task in suite.tasks}
    assert by_name["boolq"].baseline() == 0.62 and by_name["commonsense_qa"].baseline() == 0.403
    assert by_name["jeopardy"].delimiter == "\nAnswer: " and by_name["jeopardy"].num_fewshot == 10
    assert by_name["hellaswag"].num_fewshot == 10 and by_name["hellaswag_zeroshot"].num_fewshot == 0


def test_the_gauntlet_has_its_31_tasks_in_five_categories(data):
    suite = read_suite("gauntlet", data)
    assert len({task.part_of or task.name for task in suite.tasks}) == 31
    counts = {}
    for task in suite.tasks:
        counts.setdefault(task.category, set()).add(task.part_of or task.name)
    assert {name: len(found) for name, found in counts.items()} == {
        "world_knowledge": 6,
        "commonsense_reasoning": 7,
        "language_understanding": 4,
        "symbolic_problem_solving": 8,
        "reading_comprehension": 6,
    }


def test_a_task_with_categories_is_asked_category_by_category(data):
    tasks = read_suite("gauntlet", data, ["jeopardy"]).tasks
    assert [(task.name, task.part_of, len(task.items)) for task in tasks] == [
        ("jeopardy-history_old", "jeopardy", 1),
        ("jeopardy-law", "jeopardy", 2),
    ]
    (law,) = read_suite("gauntlet", data, ["jeopardy-law"]).tasks
    assert law.name == "jeopardy-law"
    with pytest.raises(ConfigError, match="there is no task 'jeopardy-lawn'"):
        read_suite("gauntlet", data, ["jeopardy-lawn"])


def test_thoughts_stand_in_examples_and_the_answer_after_them_counts(data):
    (task,) = read_suite("gauntlet", data, ["svamp"]).tasks
    assert task.items[0].as_shot(task.delimiter) == "a\n\nA:bThe answer is 3"
    right = match_answer("2 and 1. The answer is 3.", task.items[0].continuations, task.compare)
    assert right == {"exact_match": 1.0}
    assert match_answer("3. The answer is 4", task.items[0].continuations, task.compare) == {"exact_match": 0.0}


def made(task, value, category, part_of=""):
    return TaskResult(task, "cloze", "core", 0, {"acc": Estimate(value, None)}, 0.0, [], "", "", category, part_of)


def test_parts_are_averaged_to_their_task_and_tasks_to_their_category():
    results = [made("a-1", 0.2, "x", "a"), made("a-2", 0.4, "x", "a"), made("b", 0.5, "x"), made("c", 1.0, "y")]
    found = average(results)
    assert found["x"].value == pytest.approx((0.3 + 0.5) / 2)
    assert found["average"].value == pytest.approx((0.4 + 1.0) / 2)
