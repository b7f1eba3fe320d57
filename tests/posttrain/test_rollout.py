"""Rollouts as a source of batches: alike on every layout, by the log-probabilities that are trained, resumed bitwise."""

import json

import pytest
import torch

from megalm.config.errors import ConfigError
from megalm.posttrain.rollout import RolloutSource
from tests.distributed import run_ranks
from tests.posttrain.reinforced import build, train, words

NUMBERS = ("loss", "grad_norm", "reward/mean", "rollout/length", "rollout/entropy", "policy/ratio", "tokens")
LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "context": (2, ["parallel.context=2"]),
    "data": (2, []),
    "zero2": (2, ["parallel=zero2"]),
    "data-tensor": (4, ["parallel.tensor=2"]),
    "pipeline-context": (4, ["parallel.pipeline=2", "parallel.context=2"]),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    arguments = words(folder)
    (found,) = run_ranks(1, train, 1, arguments, folder / "run", NUMBERS)
    return arguments, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_the_same_on_every_layout(alone, tmp_path, layout):
    arguments, expected = alone
    world, parallel = LAYOUTS[layout]
    for found in run_ranks(world, train, world, [*arguments, *parallel], tmp_path / "run", NUMBERS):
        assert found == [pytest.approx(step, rel=1e-5, abs=1e-6) for step in expected]


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "gspo", "cispo", "rloo"])
def test_every_objective_is_the_same_where_texts_are_cut_over_ranks(tmp_path, objective):
    arguments = words(
        tmp_path, f"objective={objective}", "rollout.epochs=2", "objective.policy.kl=0.1", "train.micro_batch_size=1"
    )
    names = ("loss", "grad_norm", "policy/ratio", "tokens", "policy/kl", "policy/clipped")
    (expected,) = run_ranks(1, train, 1, arguments, tmp_path / "one", names, 6)
    parallel = ["parallel.context=2", "parallel.pipeline=2"]
    for found in run_ranks(4, train, 4, [*arguments, *parallel], tmp_path / "four", names, 6):
        assert found == [pytest.approx(step, rel=2e-5, abs=2e-6) for step in expected]
    assert expected[0][-2] == 0 and expected[-1][-2] > 0  # it leaves the reference


@pytest.mark.parametrize(
    "change", ["train.micro_batch_size=1", "train.micro_batch_size=16", "rollout.packing=false", "rollout.rows=3"]
)
def test_neither_micro_batches_nor_packing_nor_rows_written_together_change_the_run(alone, tmp_path, change):
    arguments, expected = alone
    found = train(1, [*arguments, change], tmp_path / "run", NUMBERS)
    assert found == [pytest.approx(step, rel=1e-5, abs=1e-6) for step in expected]


def test_the_reward_rises(tmp_path):
    steps = train(1, words(tmp_path, "train.steps=60"), tmp_path / "run", ("reward/mean",), steps=60)
    assert sum(reward for (reward,) in steps[-5:]) / 5 > sum(reward for (reward,) in steps[:5]) / 5 + 0.2


def test_what_is_trained_is_what_was_drawn(tmp_path):
    steps = train(1, words(tmp_path), tmp_path / "run", ("policy/mismatch", "policy/ratio"))
    assert all(mismatch < 1e-6 and abs(ratio - 1) < 1e-5 for mismatch, ratio in steps)
    later = train(1, words(tmp_path, "rollout.epochs=2"), tmp_path / "later", ("policy/mismatch",), steps=4)
    assert [mismatch > 1e-4 for (mismatch,) in later] == [False, True, False, True]  # the second time it has moved


@pytest.mark.parametrize("again", [[], ["rollout.updates=2", "rollout.epochs=2"]])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_that_was_cut_goes_on_bitwise(tmp_path, again, stop):
    arguments = words(tmp_path, *again)
    whole = build(1, arguments, tmp_path / "whole")
    expected = [whole.train_step() for _ in range(6)]
    first = build(1, arguments, tmp_path / "first")
    for _ in range(stop):
        first.train_step()
    first.checkpoints.close()
    state = json.loads(json.dumps(first.state_dict()))
    second = build(1, arguments, tmp_path / "second")
    for box, other in zip(second.boxes(), first.boxes(), strict=True):
        box.tensor.copy_(other.tensor)
    second.restore(state)
    found = [second.train_step() for _ in range(stop, 6)]
    for step, right in zip(found, expected[stop:], strict=True):
        assert step["loss"] == right["loss"] and step["grad_norm"] == right["grad_norm"]
    for box, other in zip(second.boxes(), whole.boxes(), strict=True):
        assert torch.equal(box.tensor, other.tensor)
    for trainer in (whole, first, second):
        trainer.batch_source.close()


def test_a_completion_depends_on_its_number_alone(tmp_path):
    trainer = build(1, words(tmp_path), tmp_path / "run")
    source = trainer.batch_source
    assert isinstance(source, RolloutSource)
    source.next()
    first = source.samples(4)
    source.load_state_dict({**source.state_dict(), "groups": 2})
    source.next()
    assert source.samples(2) == first[2:]
    source.close()


def test_groups_are_skipped_and_told(tmp_path):
    trainer = build(1, words(tmp_path), tmp_path / "run")
    source = trainer.batch_source
    told = source.describe(source.next_positions())
    assert len(told) == 16 and told[0]["document"].endswith(tuple("0123456789")) and told[0]["source"] == "rollout"
    source.skip(0, 6)  # the first group, and the half of the second
    assert source.next_positions()[0] == 8
    source.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rollout.prompts=[]", "give prompts"),
        ("rollout.rewards=[]", "something to reward"),
        ("rollout.rewards=[exakt]", "'exakt' is none of exact"),
        ("rollout.rewards=[/nowhere/r.py:low]", "there is no file /nowhere/r.py"),
        ("rollout.group_size=3", "use 15 or 18"),
        ("rollout.max_tokens=28", "leaves room for 1 to 5"),
        ("parallel.data_mode=fully_shard", "no rank has whole weights"),
        ("data.tokenizer=null", "set data.tokenizer"),
        ("objective=next_token", "read by objective.name=policy alone"),
    ],
)
def test_what_cannot_be_written_or_judged_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        build(1, [*words(tmp_path), change], tmp_path / "run")
