"""metrics.jsonl: one object a step, written by one rank."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.config.errors import explain_full_disk
from megalm.journal import AppendedFile, encode_json, read_steps
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class MetricsWriter(Hook):
    """Appends each step's record. A resumed run first drops the lines of steps that it is going to make again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._on_disk = True

    def on_train_start(self, trainer: "Trainer") -> None:
        kept = "".join(
            encode_json(step) + "\n" for step in read_steps(self.path) if step["step"] <= trainer.step
        ).encode()
        if not self.path.exists() or kept != self.path.read_bytes():
            self._replace(kept)
        self._file = AppendedFile(self.path)

    def _replace(self, text: bytes) -> None:
        """Exchange the file at once, so that a crash leaves the one or the other."""
        aside = self.path.with_suffix(".jsonl.new")
        try:
            with aside.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a power cut after the rename leaves zeros where the lines were
            os.replace(aside, self.path)
        except OSError as error:
            raise explain_full_disk(error) or error from None

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        was_on_disk, self._on_disk = self._on_disk, self._file.append(encode_json(record))
        if was_on_disk and not self._on_disk:
            text = (
                f"{self.path} cannot be written: is the disk full? The run goes on, and its lines are kept until it can"
            )
            trainer.events.write("warning", step=record["step"], what="metrics", text=text)

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        self._file.close()
