"""What a tracker of experiments is to a run, and the one hook that tells each of them what happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.config import Config
from megalm.journal import QUIET, describe_event, read_course, read_events
from megalm.observe.trackers.lineage import collect_lineage
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


FILES = ("report.html", "config.yaml", "plan.json", "events.jsonl")
"""Of a run's folder, for trackers that keep files."""


class Tracker:
    """Shows a run's numbers and events somewhere; override what it shows. Asked on rank 0 alone; what it raises ends its
    showing, not the run. A step must not wait for a network: what is slow is done in a thread of the tracker's own."""

    def start(self, config: Config, step: int) -> None:
        """The run (or what goes on of it) begins; steps from this one on follow. What was shown of them is forgotten."""

    def describe(self, facts: Mapping[str, str]) -> None:
        """Describe where the run comes from: versions, commit, digests of the data, parent; right after `start`."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, each by a name with a folder: train/loss, eval/loss, events/spike."""

    def text(self, step: int, name: str, text: str) -> None:
        """A sentence on a step, under a name as of `scalars`."""

    def go_back(self, step: int, number: int, abandoned: dict[int, dict[str, float]]) -> None:
        """Steps from this one on are made again. abandoned: what `scalars` was told of them; `number` counts the returns."""

    def finish(self, status: int, files: Sequence[Path]) -> None:
        """Nothing follows. status: the run's exit status; files: its report, settings, plan and events, to be kept with it."""


class TrackerHook(Hook):
    """Tells a tracker each number of a step's record as train/NAME, or as it is where it has a folder (eval/loss), and each
    event that disturbs a run as events/KIND: 1 at its step, and what it was in words."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._step: int | None = None
        """The step told last; None before the start."""

    @property
    def name(self) -> str:
        return type(self.tracker).__name__

    def on_train_start(self, trainer: Trainer) -> None:
        self._folder = trainer.folder
        self.tracker.start(trainer.config, trainer.step + 1)
        self.tracker.describe(collect_lineage(trainer))
        self._go_on(trainer.step + 1)

    def on_event(self, event: dict[str, Any]) -> None:
        if self._step is not None and event["kind"] not in QUIET:
            name = f"events/{event['kind']}"
            self.tracker.scalars(event["step"], {name: 1.0})
            self.tracker.text(event["step"], name, describe_event(event))

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        step = record["step"]
        if self._step is not None and step <= self._step:
            abandoned = read_course(self._folder / "metrics.jsonl").abandoned  # this step, made again, is in it already
            last = {each["step"]: name_scalars(each) for each in abandoned[-1]} if abandoned else {}
            self.tracker.go_back(step, len(abandoned), last)
            self._go_on(step)
        self._step = step
        self.tracker.scalars(step, name_scalars(record))

    def _go_on(self, step: int) -> None:
        """Start the tracker at this step; the events of steps that were made before are told once more."""
        self._step = step - 1
        for event in read_events(self._folder / "events.jsonl"):
            if event["step"] >= step:
                self.on_event(event)

    def on_train_end(self, trainer: Trainer, status: int) -> None:
        kept = [self._folder / name for name in FILES]
        self.tracker.finish(status, [file for file in kept if file.is_file()])


def name_scalars(record: dict[str, Any]) -> dict[str, float]:
    """Name the numbers of a record as trackers show them."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float))
    }
