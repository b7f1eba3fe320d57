"""A collapsing router is an event with a cause: once for each episode, not for a passing one."""

import json

import pytest

from megalm.config.guard import GuardConfig
from megalm.config.model import MoEConfig
from megalm.guard.router import RouterHook, RouterWatch
from megalm.observe.report import write_report
from tests.mixtures import mixture_run
from tests.train.test_mixture_runs import close, make, state_boxes


def watch(**changes):
    return RouterWatch(MoEConfig(num_experts=8, selection_bias=True), **{"share": 0.5, "patience": 3, **changes})


def record(**dead):
    found = {"loss": 2.0, "router/dead": 99.0, "router/max_load": 9.0}
    for layer, count in dead.items():
        found |= {f"router/{layer[1:]}/dead": float(count), f"router/{layer[1:]}/max_load": 4.0}
    return found


def test_half_of_the_experts_idle_for_long_enough_is_told_once():
    seen = watch()
    told = [[each.layer for each in seen.see(step, record(l1=4, l2=3))] for step in range(1, 8)]
    assert told == [[], [], [1], [], [], [], []]


def test_what_recovers_and_comes_again_is_told_again():
    seen = watch()
    course = [5, 5, 0, 5, 5, 5, 5, 1, 6, 6, 6]
    told = [step for step, dead in enumerate(course, 1) if seen.see(step, record(l7=dead))]
    assert told == [6, 11]


def test_the_streak_goes_on_over_a_restart():
    seen, again = watch(), watch()
    seen.see(1, record(l1=8)), seen.see(2, record(l1=8))
    again.load_state_dict(json.loads(json.dumps(seen.state_dict())))
    (found,) = again.see(3, record(l1=8))
    assert (found.layer, found.dead, found.since) == (1, 8, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_text_names_layer_experts_and_what_helps(bias):
    seen = RouterWatch(MoEConfig(num_experts=8, selection_bias=bias, balance_loss=1e-3), 0.5, 1)
    (found,) = seen.see(5, record(l3=6))
    text = seen.explain(found, 5)
    assert "layer 3 has sent no token to 6 of 8 experts" in text and "model.moe.balance_loss=0.01" in text
    assert ("model.moe.bias_rate=0.01" in text) == bias


def test_a_run_whose_router_collapses_says_so(tmp_path):
    words = ["model.moe.groups=0", "model.moe.top_groups=0", "model.moe.bias_rate=0"]
    trainer = make(1, mixture_run(tmp_path, "deepseek", *words), tmp_path)
    trainer.hooks.append(RouterHook(GuardConfig(router_patience=2), trainer.config.model.moe))
    (bias,) = (box.tensor for chunk in trainer.model_chunks for box in state_boxes(chunk))
    bias[:3] = 100.0
    lines = []
    for _ in range(3):
        made = trainer.train_step()
        lines.append(json.dumps(made))
        for hook in trainer.hooks:
            hook.on_step_end(trainer, made)
    close(trainer)
    trainer.events.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "router"]
    assert (event["step"], event["layer"], event["dead"], event["cause"], event["onset"]) == (2, 1, 5, "collapse", 1)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path).read_text()
    assert "largest load of an expert" in page and "has sent no token to 5 of 8" in page
