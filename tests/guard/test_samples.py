"""Which samples a step was made from: after rollbacks, with what the guard left out."""

import json

import pytest

from megalm.config import ConfigError
from megalm.guard.samples import positions_of_step


@pytest.fixture
def run(tmp_path):
    # Steps 1 to 5 of batches of 4; at step 5 back to step 2, leaving out positions 10 to 18.
    made = [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (3, 20), (4, 24)]
    records = [{"step": step, "samples": samples, "loss": 1.0} for step, samples in made]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    decision = {"action": "rollback", "step": 5}
    events = [
        {"kind": "skip", "step": 4, "samples": [12, 16], "decision": {"action": "skip", "step": 4}},
        {"kind": "rollback", "step": 5, "to_step": 2, "samples": [10, 18], "decision": decision},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return tmp_path


@pytest.mark.parametrize(
    "step, expected", [(1, [0, 1, 2, 3]), (2, [4, 5, 6, 7]), (3, [8, 9, 18, 19]), (4, [20, 21, 22, 23])]
)
def test_positions_are_those_of_the_last_time_the_step_was_made(run, step, expected):
    assert positions_of_step(run, step, 4).tolist() == expected


def test_a_step_that_was_not_made_is_refused_with_those_that_were(run):
    with pytest.raises(ConfigError, match="steps 1 to 5"):
        positions_of_step(run, 9, 4)
