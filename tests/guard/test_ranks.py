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


def flipped(folder, ranks, *more, steps=52):
    words = [
        "guard.provoke.rank=1",
        "guard.provoke.bit=3",
        "guard.replica_check_every=16",
        "train.micro_batch_size=2",
        *more,
    ]
    (_, made, events), *_ = run_ranks(ranks, train_on_ranks, overrides(folder, "bit_flip", *words, steps=steps))
    return made, events


def test_replicas_that_differ_are_found_without_any_spike(tmp_path):
    steps, events = flipped(tmp_path, 2)
    found = [e for e in events if e["kind"] == "sdc"]
    assert [(e["step"], e["cause"], e["rank"], e["ranks"]) for e in found] == [(48, "hardware", None, [0, 1])]
    assert steps[-1] == 52 and len(steps) > 52


def test_of_three_replicas_the_odd_one_is_named_and_the_steps_since_are_made_again(tmp_path):
    steps, events = flipped(tmp_path, 3)
    found = [e for e in events if e["kind"] == "sdc"]
    assert [(e["step"], e["onset"], e["rank"], e["what"]) for e in found] == [(48, 33, 1, "weights")]
    back = [e["to_step"] for e in events if e["kind"] == "replay"]
    assert len(back) == 1 and back[0] <= 32
    assert steps[-1] == 52 and steps.count(33) == 2 and steps.count(back[0]) == 1


@pytest.mark.parametrize("layout", ["data", "zero1"])
def test_where_no_earlier_state_is_left_the_odd_rank_takes_the_majoritys_weights(tmp_path, layout):
    more = ["guard.snapshot_lags=[]", "guard.probe_sequences=0", "guard.provoke.step=48", *LAYOUTS[layout]]
    steps, events = flipped(tmp_path, 3, *more, "guard.replica_check_every=1")
    kinds = [e["kind"] for e in events if e["kind"] in ("sdc", "recovered", "replay", "give_up")]
    assert steps == list(range(1, 53))
    assert kinds == (["sdc", "recovered"] if layout == "data" else [])  # ZeRO's gathering overwrites it after the step
