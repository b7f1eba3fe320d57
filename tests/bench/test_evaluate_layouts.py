"""The table of what a model is said to know, layout by layout."""

import json

from tools.bench.__main__ import main
from tools.bench.layouts.evaluate_layouts import compare


def test_two_ranks_decide_as_one_does(capsys):
    words = ["--models", "llama", "--largest-world", "2", "--batch-tokens", "8192", "--limit", "6", "--json"]
    assert main(["evaluate_layouts", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 5 and found["decisions_that_differ"] == 0 and found["largest_difference"] < 1e-4


def test_another_decision_and_number_are_counted():
    alone = [([-1.0, -2.0], 0), ([-3.0], 0)]
    assert compare(alone, [alone])["decisions_that_differ"] == 0
    found = compare(alone, [alone, [([-1.0, -0.5], 1), ([-3.0], 0)]])
    assert found == {"items": 2, "decisions_that_differ": 1, "largest_difference": 1.5}
