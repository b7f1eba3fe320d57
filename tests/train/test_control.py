"""What hooks ask of a run: factors by name, for good or for one step; a checkpoint, an end; and what is told to them."""

import pytest

from megalm.checkpoint.commit import list_committed, parse_step
from megalm.train.control import RunControl
from megalm.train.hooks import Hook, check_names, state_of
from tests.small_run import small_run
from tests.train.test_trainer import train


def test_factors_multiply_and_a_jump_is_gone_after_its_step():
    control = RunControl()
    assert control.lr_scale == 1.0 and isinstance(control.lr_scale, float)
    control.set_rate_factor("guard", 0.5)
    control.set_rate_factor("ease", 0.5)
    control.jump_rate("provoke", 8.0)
    control.scale_gradients(3.0)
    assert control.lr_scale == 2.0 and control.gradient_factor == 3.0
    assert control.state_dict() == {"lr_scale": 0.25, "lr_factors": {"guard": 0.5, "ease": 0.5}}
    control.end_step()
    assert control.lr_scale == 0.25 and control.gradient_factor == 1.0


def test_the_factor_of_an_earlier_checkpoint_is_the_guards():
    control = RunControl()
    control.load_state_dict({"lr_scale": 0.7})
    control.set_rate_factor("guard", 0.9)
    assert control.lr_scale == 0.9


class Counting(Hook):
    name = "counting"

    def state_dict(self):
        return {"count": 1}


def test_a_state_is_found_under_the_name_and_under_an_earlier_versions():
    assert state_of(Counting(), {"counting": {"count": 2}, "Counting": {"count": 1}}) == {"count": 2}
    assert state_of(Counting(), {"Counting": {"count": 1}}) == {"count": 1}
    assert state_of(Counting(), {}) == {}


def test_two_states_under_one_name_are_refused():
    with pytest.raises(ValueError, match="'counting'"):
        check_names([Counting(), Counting()])
    check_names([Hook(), Hook(), Counting()])


class Watch(Hook):
    def __init__(self):
        self.moments = []

    def on_step_end(self, trainer, record):
        if record["step"] == 2:
            trainer.control.request_save()
        if record["step"] == 4:
            trainer.control.finish(1, "enough")

    def on_evaluation(self, trainer, values):
        self.moments.append(("evaluation", trainer.step, set(values)))

    def on_checkpoint(self, trainer, step):
        self.moments.append(("checkpoint", step))

    def on_event(self, event):
        self.moments.append((event["kind"], event["step"]))


def test_a_hook_has_the_run_saved_and_ended_and_is_told_of_all_that_happens(tmp_path):
    watch = Watch()
    words = ["checkpoint.every=0", "checkpoint.asynchronous=false", "checkpoint.keep=0"]
    trainer, _, status = train(small_run(tmp_path, *words), watch)
    assert status == 1 and trainer.step == 4 and trainer.control.reason == "enough"
    assert sorted(parse_step(path) for path in list_committed(trainer.checkpoints.folder)) == [2, 4]
    assert [moment for moment in watch.moments if moment[0] == "evaluation"] == [("evaluation", 3, {"eval/loss"})]
    assert watch.moments.count(("checkpoint", 2)) == 2 and watch.moments.count(("checkpoint", 4)) == 2
