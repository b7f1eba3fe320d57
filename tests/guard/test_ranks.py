"""All ranks decide alike, on every layout, and the rank whose hardware failed is named."""

import pytest

from tests.distributed import run_ranks
from tests.guard.runs import overrides, train, train_on_ranks

LAYOUTS = {
    "data": [],
    "zero1": ["parallel=zero1"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
}


def decisions(events):
    kept = [e for e in events if e["kind"] in ("spike", "skip", "replay", "rollback", "verdict")]
    return [(e["kind"], e["step"], e["onset"], e["cause"], e.get("samples"), e.get("to_step")) for e in kept]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return decisions(train(overrides(tmp_path_factory.mktemp("alone"), "second_moment", steps=50)).events)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_decisions_on_every_layout(tmp_path, layout, alone):
    arguments = overrides(tmp_path, "second_moment", *LAYOUTS[layout], steps=50)
    (first, steps, events), (second, other_steps, _) = run_ranks(2, train_on_ranks, arguments)
    assert first == second and steps == other_steps
    assert decisions(events) == alone and [d[0] for d in alone] == ["spike", "replay", "spike", "rollback"]


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_the_rank_of_a_bit_flip_is_named(tmp_path, layout):
    arguments = overrides(tmp_path, "bit_flip", "guard.provoke.rank=1", *LAYOUTS[layout], steps=46)
    (_, _, events), _ = run_ranks(2, train_on_ranks, arguments)
    found = [e for e in events if e["kind"] == "verdict"]
    assert [e["ranks"] for e in found] == [[1]] and found[0]["cause"] == "hardware"


def test_replicas_that_differ_are_found_without_any_spike(tmp_path):
    more = ["guard.provoke.rank=1", "guard.provoke.bit=3", "guard.replica_check_every=16"]
    (_, steps, events), _ = run_ranks(2, train_on_ranks, overrides(tmp_path, "bit_flip", *more, steps=52))
    found = [e for e in events if e["kind"] == "verdict"]
    assert [(e["step"], e["cause"], e["ranks"]) for e in found] == [(48, "hardware", [0, 1])]
    assert steps[-1] == 52 and len(steps) > 52
