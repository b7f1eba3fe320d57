"""A hook that only shows a run can fail without ending it."""

from types import SimpleNamespace

import pytest

from megalm.journal import EventLog, read_events
from megalm.observe.bystander import Bystander
from megalm.train.hooks import Hook


class Failing(Hook):
    def __init__(self, moment):
        self.moment, self.asked = moment, []

    def _come(self, moment):
        self.asked.append(moment)
        if moment == self.moment:
            raise BrokenPipeError("nobody reads")

    def on_train_start(self, trainer):
        self._come("start")

    def on_step_end(self, trainer, record):
        self._come("step")

    def on_train_end(self, trainer, status):
        self._come("end")


@pytest.mark.parametrize(
    ("moment", "asked"),
    [
        ("start", ["start", "end"]),
        ("step", ["start", "step", "end"]),
        ("end", ["start", "step", "step", "end"]),
        ("never", ["start", "step", "step", "end"]),
    ],
)
def test_after_a_failure_it_is_only_asked_to_close(tmp_path, moment, asked):
    trainer = SimpleNamespace(step=7, events=EventLog(tmp_path / "events.jsonl"))
    hook = Failing(moment)
    watched = Bystander(hook)
    watched.on_train_start(trainer)
    watched.on_step_end(trainer, {})
    watched.on_step_end(trainer, {})
    watched.on_train_end(trainer, 0)
    told = [event["text"] for event in read_events(tmp_path / "events.jsonl")]
    assert hook.asked == asked
    assert len(told) == (moment != "never") and all("Failing" in text and "nobody reads" in text for text in told)


def test_an_interrupt_is_not_swallowed():
    class Interrupted(Hook):
        def on_step_end(self, trainer, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bystander(Interrupted()).on_step_end(None, {})
