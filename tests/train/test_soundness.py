"""Weights that are not finite are never saved in place of good ones, and a run of them does not go on or end well."""

import json
import math

import pytest
import torch.distributed as dist

from megalm.checkpoint.commit import list_committed, parse_step
from megalm.checkpoint.reader import CheckpointReader
from megalm.train.hooks import Hook
from megalm.train.signals import Signals
from megalm.train.soundness import HOPELESS, Soundness
from tests.distributed import run_ranks
from tests.small_run import small_run
from tests.train.test_trainer import train


class Ruin(Hook):
    """Multiplies one step's learning rate, or puts one value into the weights before the update."""

    def __init__(self, step, factor=1.0, value=None):
        self.step, self.factor, self.value = step, factor, value

    def on_step_start(self, trainer):
        trainer.control.set_rate_factor(self.name, self.factor if trainer.step + 1 == self.step else 1.0)

    def on_gradients(self, trainer, signals):
        if self.value is not None and trainer.step + 1 == self.step:
            trainer.boxes()[0].tensor.view(-1)[0] = self.value
        return True


def steps(trainer):
    return [parse_step(path) for path in list_committed(trainer.checkpoints.folder)]


def kinds(trainer):
    lines = (trainer.folder / "events.jsonl").read_text().splitlines()
    return [event["kind"] for event in map(json.loads, lines)]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_the_last_good_checkpoint_outlives_an_update_that_ruins_the_weights(tmp_path, keep, asynchronous):
    words = ["guard=off", "train.steps=40", "train.eval_every=0", f"checkpoint.keep={keep}"]
    words.append(f"checkpoint.asynchronous={asynchronous}")
    trainer, recorder, status = train(small_run(tmp_path, *words), Ruin(12, factor=1e20))
    assert status == 1 and "weights are not finite, since step 13" in trainer.control.reason
    assert recorder.records[-1]["step"] == 12 + HOPELESS and math.isnan(recorder.losses[-1])
    assert 9 in steps(trainer) and max(steps(trainer)) <= 12, (
        "step 12 holds the ruined weights, before any loss told so"
    )
    good = CheckpointReader(trainer.checkpoints.folder / "step-00000009")
    assert all(tensor.isfinite().all() for _, tensor in good.tensors(optimizer=True))
    assert kinds(trainer).count("nonfinite") == 1 and kinds(trainer)[-1] == "unsaved"


def test_trouble_in_the_last_steps_is_told_by_the_exit_status(tmp_path):
    trainer, _, status = train(small_run(tmp_path, "guard=off", "train.steps=8"), Ruin(6, factor=1e20))
    assert status == 1 and "step 8 is not saved" in trainer.control.reason and 3 in steps(trainer)


def test_an_evaluation_is_the_last_to_see_it(tmp_path):
    trainer, _, status = train(small_run(tmp_path, "guard=off", "train.steps=6"), Ruin(6, value=math.nan))
    assert status == 1 and steps(trainer) == [3]


def test_weights_that_are_finite_and_give_no_finite_loss_are_saved_beside_the_good_ones(tmp_path):
    words = ["guard=off", "train.steps=6", "checkpoint.keep=1"]
    trainer, recorder, status = train(small_run(tmp_path, *words), Ruin(6, factor=1e20))
    assert not math.isfinite(recorder.records[-1]["eval/loss"])
    assert status == 1 and "at step 6 is not finite" in trainer.control.reason and steps(trainer) == [6, 3]


def test_a_value_that_no_loss_tells_of_is_not_saved(tmp_path):
    trainer, _, status = train(small_run(tmp_path, "train.steps=6", "train.eval_every=0", "guard=off"), Last())
    assert status == 1 and "optimizer.exp_avg" in trainer.control.reason and "not finite" in trainer.control.reason
    assert steps(trainer) == [3]


class Last(Hook):
    """Puts an infinity into a moment behind the last update."""

    def on_step_end(self, trainer, record):
        if record["step"] == 6:
            next(b for b in trainer.boxes() if b.name.startswith("optimizer.exp_avg.")).tensor.view(-1)[3] = math.inf


def test_a_state_that_came_right_again_is_saved(tmp_path):
    """As after an evaluation on numbers that overflowed: the values themselves decide."""

    class Doubt(Hook):
        def on_step_end(self, trainer, record):
            if record["step"] == 3:
                trainer.soundness.doubt(3)

    trainer, _, status = train(small_run(tmp_path, "guard=off"), Doubt())
    assert status == 0 and steps(trainer) == [6, 3] and trainer.soundness.since is None


def test_only_applied_updates_count():
    soundness = Soundness()
    bad, good = Signals(math.nan, 1.0, 0.0), Signals(2.0, 1.0, 0.0)
    assert not soundness.see(1, bad, applied=False) and soundness.since is None
    for step in range(HOPELESS - 1):
        assert not soundness.see(step, Signals(2.0, math.inf, 0.0), applied=True)
    assert not soundness.hopeless and soundness.since == 0
    assert soundness.see(20, good, applied=True) and soundness.streak == 0
    assert soundness.since == 0, "a finite loss does not prove every weight"
    assert not soundness.see(21, Signals(2.0, 1.0, 3.0), applied=True)


def ruined_on_two(words, folder):
    from megalm.config.compose import compose_config
    from megalm.launch.resolve import resolve
    from megalm.parallel.mesh import build_mesh
    from megalm.train.parts import build_trainer

    rank = dist.get_rank()
    config = compose_config(words)
    resolve(config, 2)
    (folder / "runs" / "small").mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, build_mesh(config.parallel, "cpu"), folder / "runs" / "small")
    trainer.hooks.append(Ruin(12, value=math.nan if rank == 1 else None))
    return trainer.train(), trainer.step, trainer.control.reason, steps(trainer)


def test_one_ruined_rank_is_enough_and_all_end_alike(tmp_path):
    words = [
        "guard=off",
        "train.steps=40",
        "train.eval_every=0",
        "checkpoint.keep=1",
        "world_size=2",
        "parallel.tensor=2",
    ]
    first, second = run_ranks(2, ruined_on_two, small_run(tmp_path, *words), tmp_path)
    assert first[:2] == second[:2] and first[0] == 1 and first[2] == second[2]
    assert first[3] == [9], "one value of rank 1 is enough to refuse step 12, whose own loss told nothing"
