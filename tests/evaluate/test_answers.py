"""What counts as the right answer."""

import pytest

from megalm.config.errors import ConfigError
from megalm.evaluate.answers import apply_filters, match_answer, normalize
from megalm.evaluate.tasks.suite import read_suite


@pytest.mark.parametrize(
    "text,answer,right",
    [(" The Eiffel-Tower, of course", "eiffel tower", True), ("an apple", "apple", True), ("Rome", "Paris", False)],
)
def test_the_gauntlets_comparison(text, answer, right):
    assert match_answer(text, [answer], {"normalize": True}) == {"exact_match": float(right)}
    assert normalize("The  A b_c.") == "b c"


def test_filters_follow_each_other():
    steps = [{"function": "regex", "regex_pattern": r"(-?\d+)", "group_select": -1}, {"function": "take_first"}]
    assert apply_filters("3 and 4, so 7", steps) == "7" and apply_filters("none", steps) == "[invalid]"
    with pytest.raises(ConfigError, match="the filter 'vote' is not known"):
        apply_filters("x", [{"function": "vote"}])


@pytest.mark.parametrize(
    "text,answer,right",
    [
        ("so it is 0.5", "1/2", True),
        ("He pays $29.00", "29", True),
        ("The answer is $\\frac{3}{4}$.", "0.75", True),
        ("about 12", "13", False),
        ("no idea", "13", False),
    ],
)
def test_values_count_however_they_are_written(text, answer, right):
    pytest.importorskip("math_verify")
    assert match_answer(text, [answer], {"math": True}) == {"math": float(right)}


def test_a_suite_says_how_answers_are_compared(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"context": "1 + 1 =", "answer": "2"}\n')
    entry = "{label: sums, dataset_uri: rows.jsonl, icl_task_type: question_answering, compare: %s}"
    for how in ("math", "magic"):
        (tmp_path / f"{how}.yaml").write_text("icl_tasks:\n  - " + entry % how + "\n")
    assert read_suite(str(tmp_path / "math.yaml")).tasks[0].compare == {"math": True}
    with pytest.raises(ConfigError, match="sums: compare 'magic'; there are text, math"):
        read_suite(str(tmp_path / "magic.yaml"))
