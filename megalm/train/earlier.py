"""What a run makes of another one that was in its folder, or in its place of checkpoints, before: nothing lost or mixed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.checkpoint.commit import free_name
from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.place import SetAside
from megalm.config.errors import ConfigError
from megalm.journal import encode_json, read_events

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

MOVED = (
    "metrics.jsonl", "report.html", "sample.txt", "guard_report.txt", "tensorboard", "config.yaml", "configs", "plan.json",
)  # fmt: skip
"""What a run writes into its folder when it trains, beside its events."""


def check_place(trainer: Trainer) -> None:
    """Before anything is loaded: the place of the checkpoints is this run's. Errors: ConfigError."""
    options, place = trainer.config.checkpoint, trainer.checkpoints.place
    if options.path is not None:
        place.claim(trainer.config.run.name)
    if options.load_path is not None and options.load == "weights" and place.holds(options.load_path):
        if options.resume and trainer.checkpoints.latest() is not None:
            return  # it goes on from there
        raise ConfigError(
            f"checkpoint.load_path={options.load_path} lies where this run saves: a new run with its weights needs a run.name "
            "or checkpoint.path of its own."
        )


def make_way(trainer: Trainer) -> None:
    """After the loading: see that the run can be saved, and set aside what is of another course than the one it goes on with.

    That is every checkpoint of a later step than the run stands at, and everything where it begins anew.
    Errors: ConfigError where nothing can be written.
    """
    options, checkpoints = trainer.config.checkpoint, trainer.checkpoints
    resumed = checkpoints.durable is not None
    if trainer.step >= trainer.total_steps:  # nothing will be trained, so nothing is touched
        return
    own = options.load_path is not None and options.load == "all" and checkpoints.place.holds(options.load_path)
    try:
        checkpoints.prepare(trainer.boxes())
    except CheckpointError as error:
        raise ConfigError(
            f"this run could not be saved: {error}. Make the place writable, make room, or give another checkpoint.path."
        ) from None
    checkpoints.trust(trainer.step - 1)  # the next step's loss tells whether the state is good
    moved = checkpoints.place.set_aside_after(trainer.step if resumed or own else -1)
    folder = None
    if not resumed:
        folder = checkpoints.broadcast(_set_journals_aside(trainer, own) if trainer.is_writer else None)
    if moved is not None or folder is not None:
        trainer.events.write("set_aside", step=trainer.step, text=_words(moved, folder))


def _set_journals_aside(trainer: Trainer, own: bool) -> Path | None:
    """Metrics, events and pages of a former run, moved to a folder of their own; None where there was none.

    A run that died before its first checkpoint is no former one: it starts again, and what its guard had decided holds.
    own: the run goes on from one of the former's checkpoints; up to there they are the same.
    """
    written = trainer.events.path
    former = written.read_bytes()[: trainer.events.size_at_opening]
    saved = any(event["kind"] == "checkpoint" for event in read_events(written))
    if not saved and (trainer.config.checkpoint.resume or not (trainer.folder / "metrics.jsonl").exists()):
        return None
    folder = trainer.folder / free_name(os.listdir(trainer.folder))
    try:
        folder.mkdir()
        (folder / written.name).write_bytes(former)
        for name in MOVED:
            path = trainer.folder / name
            if own and path.is_file():
                shutil.copyfile(path, folder / name)
            elif path.exists() and not own:
                os.rename(path, folder / name)
        # In place: the file is open, to be appended to.
        mine = written.read_bytes()[trainer.events.size_at_opening :]
        kept = [event for event in read_events(folder / written.name) if own and event["step"] <= trainer.step]
        os.truncate(written, 0)
        with written.open("ab") as file:
            file.write("".join(encode_json(event) + "\n" for event in kept).encode() + mine)
    except OSError as error:
        raise ConfigError(f"{folder}: the former run cannot be set aside ({error.strerror or error}).") from None
    return folder


def _words(moved: SetAside | None, folder: Path | None) -> str:
    parts = []
    if moved is not None:
        steps = f"step {moved.steps[0]}" if len(moved.steps) == 1 else f"steps {', '.join(map(str, moved.steps))}"
        parts.append(f"checkpoints of {steps} of another course are now in {moved.where}")
    if folder is not None:
        parts.append(f"metrics and events of the run before are in {folder}")
    return "; ".join(parts)
