"""metrics.jsonl: one object a step, written by one rank."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.journal import AppendedFile, json_text, read_json_lines
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


Record = dict[str, Any]


def last_course(records: Sequence[Record]) -> tuple[list[Record], list[list[Record]]]:
    """(the steps as they count, stretches that the run went back on), both in the order of their steps.

    A run that goes back makes the same steps again; in the file they follow the abandoned ones.
    """
    kept: list[Record] = []
    abandoned: list[list[Record]] = []
    for record in records:
        first = len(kept)
        while first and kept[first - 1]["step"] >= record["step"]:
            first -= 1
        if first < len(kept):
            abandoned.append(kept[first:])
            del kept[first:]
        kept.append(record)
    return kept, abandoned


class MetricsWriter(Hook):
    """Appends each step's record. A resumed run first drops the lines of steps that it is going to make again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: "Trainer") -> None:
        kept = [record for record in read_json_lines(self.path) if record["step"] <= trainer.step]
        aside = self.path.with_suffix(".jsonl.new")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json_text(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename leaves zeros where the lines were
        os.replace(aside, self.path)
        self._file = AppendedFile(self.path)

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        self._file.append(json_text(record))

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        self._file.close()
