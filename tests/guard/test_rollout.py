"""What is found wrong with rollouts, on made-up records, and in runs with a planted fault."""

import json

import pytest

from megalm.config.errors import ConfigError
from megalm.config.guard_rollout import RolloutGuardConfig, check_rollout_guard
from megalm.guard.rollout import RolloutWatch
from megalm.posttrain.hook import RolloutHook
from tests.posttrain.reinforced import build, words

HEALTHY = {
    "rollout/flat": 0.3, "rollout/cut": 0.05, "rollout/entropy": 1.0, "rollout/length": 20.0, "rollout/repeated": 0.02,
    "policy/mismatch": 1e-7, "reward/mean": 0.4, "reward/exact": 0.4, "reward/std": 0.3,
}  # fmt: skip


def see(watch, count=20, **course):
    """Causes told, with the rollout: of records whose numbers are functions of the rollout."""
    told = []
    for number in range(1, count + 1):
        record = {**HEALTHY, **{key.replace("__", "/"): value(number) for key, value in course.items()}}
        told += [(finding.cause, number) for finding in watch.see(record)]
    return told


def test_a_healthy_run_is_told_nothing():
    noise = [0.01, -0.02, 0.015, -0.005, 0.0]
    assert see(RolloutWatch(RolloutGuardConfig(), ["exact"]), 100, reward__mean=lambda n: 0.4 + n / 200 + noise[n % 5],
               reward__exact=lambda n: 0.4 + n / 200 + noise[n % 5]) == []  # fmt: skip


@pytest.mark.parametrize(
    ("cause", "course"),
    [
        ("flat", {"rollout__flat": lambda n: 1.0}),
        ("cut", {"rollout__cut": lambda n: 1.0}),
        ("entropy", {"rollout__entropy": lambda n: 1.0 if n < 8 else 0.05}),
        ("entropy", {"rollout__entropy": lambda n: 1.0 if n < 8 else 3.0}),
        ("length", {"rollout__length": lambda n: 20.0 if n < 8 else 90.0}),
        ("length", {"rollout__length": lambda n: 20.0 if n < 8 else 2.0}),
        ("repeated", {"rollout__repeated": lambda n: 0.02 if n < 8 else 0.6}),
        ("kl", {"policy__kl": lambda n: 2.0}),
        ("mismatch", {"policy__mismatch": lambda n: 0.05}),
    ],
)
def test_each_fault_is_told_once_within_20_rollouts(cause, course):
    assert [name for name, _ in see(RolloutWatch(RolloutGuardConfig()), **course)] == [cause]


def test_a_reward_that_is_bought_with_another_is_told():
    watch = RolloutWatch(RolloutGuardConfig(), ["exact"])
    told = see(
        watch,
        reward__mean=lambda n: 0.5 + n / 20,
        reward__format=lambda n: 0.1 + n / 15,
        reward__exact=lambda n: 0.4 - n / 60,
    )
    assert [name for name, _ in told] == ["accuracy", "reward"] or {name for name, _ in told} == {"reward", "accuracy"}
    assert max(number for _, number in told) <= 20


def test_it_is_told_again_after_it_had_gone():
    watch = RolloutWatch(RolloutGuardConfig(patience=2))
    told = see(watch, rollout__cut=lambda n: 0.0 if n in (5, 6) else 1.0)
    assert told == [("cut", 2), ("cut", 8)]
    again = RolloutWatch(RolloutGuardConfig(patience=2))
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert see(again, rollout__cut=lambda n: 1.0) == []  # it knows that it has told it


def test_an_unknown_answer_is_refused():
    with pytest.raises(ConfigError, match="an answer one of event, lower_rate, pause, stop"):
        check_rollout_guard(RolloutGuardConfig(answers={"cut": "panic"}))


HACK = '''
def form(prompt, completion, record):
    """Pays for digits, whatever they say."""
    return sum(letter in "0123456789" for letter in completion) / max(len(completion), 1)
'''


def run(folder, *overrides):
    """(exit status, events, the run's folder) of a run with its hook."""
    arguments = words(folder, "guard=default", "guard.rungs=[]", "guard.rollout.patience=4", *overrides)
    trainer = build(1, arguments, folder / "run")
    trainer.hooks.append(RolloutHook(trainer.config, folder / "run", trainer.batch_source))
    status = trainer.train()
    events = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]
    return status, [event for event in events if event["kind"] == "rollout"]


def test_a_planted_format_reward_is_caught_within_20_steps(tmp_path):
    (tmp_path / "form.py").write_text(HACK)
    status, events = run(
        tmp_path, f"rollout.rewards=[{tmp_path}/form.py:form,exact]", "optim.lr=3e-2", "train.steps=40",
        "train.global_batch_size=64", "rollout.group_size=8", "guard.rollout.answers={accuracy: stop}",
    )  # fmt: skip
    assert status == 3 and events[-1]["cause"] == "accuracy" and events[-1]["step"] <= 20
    samples = (tmp_path / "run" / events[-1]["samples"]).read_text().splitlines()
    assert json.loads(samples[0])["completions"][0]["rewards"].keys() == {"form", "exact"}


@pytest.mark.parametrize(("answer", "status"), [("event", 0), ("pause", 130), ("stop", 3), ("lower_rate", 0)])
def test_groups_without_spread_are_answered_as_was_asked(tmp_path, answer, status):
    ended, events = run(
        tmp_path, "rollout.rewards=[exact]", f"guard.rollout.answers={{flat: {answer}}}", "train.steps=8"
    )
    assert ended == status
    flat = next(event for event in events if event["cause"] == "flat")
    assert flat["answer"] == answer and flat["step"] == 4
    saved = list((tmp_path / "run/checkpoints").glob("step-*")) if (tmp_path / "run/checkpoints").exists() else []
    assert bool(saved) == (answer != "stop")


def test_cut_answers_are_caught_within_20_steps(tmp_path):
    _, events = run(tmp_path, "rollout.max_tokens=1", "train.steps=8")
    assert next(event for event in events if event["cause"] == "cut")["step"] <= 20
