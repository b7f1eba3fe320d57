"""The ladder: the right rung for a verdict, budgets, escalation, the way back of the learning rate; bad tables."""

import json

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.guard import GuardConfig, RungConfig, check_guard
from megalm.guard.policy import Decision, Policy, choose_unprobed_action


def policy(choice="default", *overrides):
    return Policy(compose_config(["+model=tiny", f"guard={choice}", *overrides]).guard)


def actions(policy, steps, verdict, **more):
    return [policy.decide(step, verdict, step, **more).action for step in steps]


def test_bad_data_is_skipped_then_jumped_over_twice_as_far_each_time():
    ladder = policy()
    taken = [ladder.decide(step, "data", 100) for step in range(100, 128)]
    assert [d.action for d in taken[:5]] == ["skip"] * 4 + ["skip_data"]
    jumps = [d.skip_after for d in taken if d.action == "skip_data"]
    assert jumps == [8, 16, 32, 64, 128, 256] and taken[10].action == "give_up"


def test_damaged_weights_climb_the_whole_ladder():
    ladder = policy()
    taken = [ladder.decide(step, "weights", step - 2) for step in range(500, 1100, 100)]
    assert [d.action for d in taken] == ["rollback", "rollback", "lower_lr", "lower_lr", "reseed", "give_up"]
    assert [d.lr_scale for d in taken] == [1, 1, 0.7, 0.5, 1, 1]
    assert [(d.attempt, d.skip_before, d.skip_after) for d in taken[:4]] == [
        (1, 20, 50),
        (2, 40, 100),
        (3, 80, 200),
        (4, 160, 340),
    ]
    assert [d.number for d in taken] == [1, 2, 3, 4, 5, 6]


def test_budgets_come_back_with_time():
    ladder = policy()
    assert actions(ladder, [1000, 1100, 2500, 2600], "weights") == ["rollback"] * 4
    assert ladder.decide(9000, "weights", 9000).attempt == 1


def test_a_slow_rise_goes_straight_to_the_learning_rate():
    assert policy().decide(500, "weights", 460, slow=True).action == "lower_lr"
    assert policy("strict").decide(500, "weights", 460, slow=True).action == "rollback"


def test_single_odd_steps_are_only_ever_refused():
    ladder = policy("default", "guard.rungs=[{action: skip, budget: 2}, {action: rollback}, {action: give_up}]")
    assert actions(ladder, [10, 20, 30], "unknown") == ["skip", "skip", "accept"]
    assert actions(ladder, [40], "data") == ["accept"]


def test_non_finite_steps_in_a_row_lead_back():
    assert actions(policy(), range(100, 105), "nonfinite") == ["skip"] * 4 + ["rollback"]


def test_the_learning_rate_returns_to_schedule():
    ladder = policy()
    for step in (500, 501, 502):
        ladder.decide(step, "weights", step)
    assert ladder.lr_scale(400) == ladder.lr_scale(502) == 0.7
    assert ladder.lr_scale(1002) == pytest.approx(0.85)
    assert ladder.lr_scale(1502) == ladder.lr_scale(9999) == 1.0


def test_books_survive_json_and_a_crash():
    ladder = policy()
    first = ladder.decide(500, "weights", 498)
    state = json.loads(json.dumps(ladder.state_dict()))
    second = ladder.decide(600, "weights", 598)
    again = policy()
    again.load_state_dict(state)
    assert again.decide(600, "weights", 598) == second
    revived = policy()
    for decision in (first, second):
        revived.adopt(Decision(**json.loads(json.dumps(decision.as_dict()))))
    assert revived.decide(700, "weights", 700) == ladder.decide(700, "weights", 700)


def test_what_the_curve_alone_is_answered_with():
    assert choose_unprobed_action("none", False) == "none"
    assert choose_unprobed_action("transient", False) == choose_unprobed_action("nonfinite", False) == "skip"
    assert choose_unprobed_action("shift", True) == choose_unprobed_action("nonfinite", True) == "rollback"


@pytest.mark.parametrize(
    "override, says",
    [
        ("guard.rungs=[{action: nap}]", ["rungs[0].action=nap", "skip_data", "give_up"]),
        ("guard.rungs=[{action: skip, budget: -3}]", ["rungs[0].budget=-3", "0 or positive"]),
        ("guard.rungs=[{action: lower_lr, lr_scale: 1.5}]", ["lr_scale=1.5"]),
        ("guard.snapshot_lags=[16,40]", ["[16, 40]", "multiple"]),
        ("guard.snapshot_lags=[64,16]", ["[64, 16]", "larger"]),
        ("guard.probe_excess=0", ["probe_excess=0"]),
        ("guard.detector.min_window=500", ["min_window=500"]),
        ("guard.provoke.kind=earthquake", ["earthquake", "bit_flip"]),
        ("guard.provoke.bit=40", ["bit=40"]),
        ("guard=gentle", ["gentle", "default", "off", "strict", "watch"]),
    ],
)
def test_a_table_that_cannot_work_is_refused_with_its_figures(override, says):
    with pytest.raises(ConfigError) as error:
        compose_config(["+model=tiny", override])
    assert all(text in str(error.value) for text in says), str(error.value)


def test_the_shipped_tables_are_good():
    for choice in ("off", "watch", "default", "strict"):
        check_guard(compose_config(["+model=tiny", f"guard={choice}"]).guard)
    check_guard(GuardConfig(rungs=[RungConfig(action="skip")]))
