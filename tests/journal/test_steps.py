"""Of a step made twice the last counts."""

import json
import math

import pytest

from megalm.journal import choose_course, encode_json, read_course, read_steps


def steps(*numbers):
    return [{"step": number, "made": place} for place, number in enumerate(numbers)]


@pytest.mark.parametrize(
    ("made", "counts", "abandoned"),
    [
        ([1, 2, 3], [1, 2, 3], []),
        ([1, 2, 3, 4, 2, 3, 4, 5], [1, 2, 3, 4, 5], [[2, 3, 4]]),
        ([1, 2, 3, 4, 3, 4, 3, 4], [1, 2, 3, 4], [[3, 4], [3, 4]]),
        ([1, 2, 3, 4, 5, 3], [1, 2, 3], [[3, 4, 5]]),
        ([5, 6, 1, 2], [1, 2], [[5, 6]]),
        ([2, 2, 2], [2], [[2], [2]]),
        ([], [], []),
    ],
)
def test_what_the_run_went_back_on_does_not_count(made, counts, abandoned):
    course = choose_course(steps(*made))
    assert [row["step"] for row in course.steps] == counts
    assert [[row["step"] for row in stretch] for stretch in course.abandoned] == abandoned
    for row in course.steps:  # the last time that it was made
        assert row["made"] == max(place for place, number in enumerate(made) if number == row["step"])


def test_numbers_that_are_not_finite_are_numbers_again(tmp_path):
    row = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "mfu": None, "phase": "nan"}
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        encode_json(row) + "\n" + json.dumps({"step": 2, "loss": math.nan}) + "\n"
    )  # the second as they were once
    first, second = read_steps(path)
    assert math.isnan(first["loss"]) and first["grad_norm"] == math.inf and first["lr"] == -math.inf
    assert first["phase"] == "nan" and first["mfu"] is None and math.isnan(second["loss"])
    assert "NaN" not in path.read_text().splitlines()[0]
    assert [each["step"] for each in read_course(path).steps] == [1, 2]
