"""Rewards: verifiers, functions of the user's, and what those do wrong: named by prompt, tried again, or counted."""

import math

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.config.rollout import RolloutConfig
from megalm.posttrain.rewards import RewardFailed, Rewards, Verifier
from tests.distributed import RankError, run_ranks
from tests.posttrain.reinforced import build, train, words

FILE = """
import os, time
calls = 0

def good(prompt, completion, record):
    print("to standard error")
    return len(completion) + record["bonus"]

def raises(prompt, completion, record):
    return 1 / 0

def nan(prompt, completion, record):
    return float("nan")

def text(prompt, completion, record):
    return "much"

def slow(prompt, completion, record):
    time.sleep(60)

def dies(prompt, completion, record):
    os._exit(1)

def second_time(prompt, completion, record):
    global calls
    calls += 1
    if calls % 2:
        raise RuntimeError("not yet")
    return 2.0

number = 3
"""


def rewards(folder, *names, **settings):
    (folder / "own.py").write_text(FILE)
    return Rewards(RolloutConfig(rewards=[f"{folder}/own.py:{name}" for name in names], **settings))


@pytest.mark.parametrize(
    ("name", "completion", "answer", "value"),
    [
        ("exact", " 12 ", "12", 1.0), ("exact", "12.0", "12", 0.0), ("number", "so 3 + 9 = 12.", 12, 1.0),
        ("number", "1,200", "1200", 1.0), ("number", "none", "12", 0.0), ("number", "12", "none", 0.0),
    ],
)  # fmt: skip
def test_verifiers(name, completion, answer, value):
    assert Verifier(name).judge("", completion, {"answer": answer}) == value


def test_a_record_without_an_answer_is_no_wrong_answer():
    with pytest.raises(RewardFailed, match="field `answer`"):
        Verifier("exact").judge("", "12", {})


def test_a_function_of_ones_own_is_called_with_the_record(tmp_path):
    made = rewards(tmp_path, "good", reward_weights=[0.5])
    judged = made.judge("p", "four", {"bonus": 2})
    assert judged.values == (6.0,) and judged.failure is None and made.total(judged.values) == 3.0
    made.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("raises", "raises raised ZeroDivisionError"), ("nan", "nan gave nan"), ("text", "text raised ValueError"),
     ("slow", "slow took longer than rollout.reward_timeout_s=0.3 s"), ("dies", "dies's process has ended")],
)  # fmt: skip
def test_what_gives_no_number_says_what_it_did_and_the_next_is_judged(tmp_path, name, message):
    made = rewards(tmp_path, name, "good", reward_timeout_s=0.3, reward_retries=0)
    for _ in range(2):
        judged = made.judge("p", "four", {"bonus": 2})
        assert judged.failure is not None and message in judged.failure and judged.values == (0.0, 6.0)
    made.close()


def test_a_failure_is_tried_again(tmp_path):
    made = rewards(tmp_path, "second_time", reward_retries=1)
    judged = made.judge("p", "c", {})
    assert judged.failure is None and judged.values == (2.0,)
    made.close()


@pytest.mark.parametrize(("name", "message"), [("missing", "AttributeError"), ("number", "is no function")])
def test_a_function_that_is_not_there_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        rewards(tmp_path, name)


SOMETIMES = """
def low(prompt, completion, record):
    if record["answer"] in ("3", "7", "11"):
        raise RuntimeError("cannot judge " + record["answer"])
    return len(completion)
"""


def test_a_run_ends_with_the_prompt_that_was_not_judged(tmp_path):
    arguments = words(tmp_path)
    (tmp_path / "reward.py").write_text(SOMETIMES)
    with pytest.raises(
        ConfigError, match=r"sums.jsonl line \d+: the prompt 'user: \d\+\d=': low raised RuntimeError: cannot judge"
    ):
        train(1, arguments, tmp_path / "run", ("loss",))
    with pytest.raises(RankError, match="cannot judge"):
        run_ranks(2, train, 2, arguments, tmp_path / "two", ("loss",))


def test_a_run_leaves_out_and_counts_what_was_not_judged(tmp_path):
    arguments = words(tmp_path, "rollout.reward_failure=count")
    (tmp_path / "reward.py").write_text(SOMETIMES)
    trainer = build(1, arguments, tmp_path / "run")
    records = [trainer.train_step() for _ in range(8)]
    failed = [record["reward/failed"] for record in records if "reward/failed" in record]
    assert (
        failed
        and all(share * 4 == int(share * 4) for share in failed)
        and all(math.isfinite(r["loss"]) for r in records)
    )
    written = trainer.batch_source.written
    assert not written.advantages[written.failed].any() and np.isfinite(written.advantages).all()
    trainer.batch_source.close()
