"""The numbers of metrics.jsonl as TensorBoard scalars."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.journal import QUIET, event_text
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class TensorBoardHook(Hook):
    """Writes each number of a step's record as a scalar named train/NAME, or as it is where it has a folder (eval/loss)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: "Trainer") -> None:
        self._open(trainer.step + 1)
        trainer.events.listeners.append(self._mark)

    def _open(self, step: int) -> None:
        """Write from this step on; what was written of it and later ones before is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step)
        self._step = step - 1

    def _mark(self, event: dict[str, Any]) -> None:
        """A point at the event's step under events/KIND, and what it was as text."""
        if event["kind"] not in QUIET:
            self._writer.add_scalar(f"events/{event['kind']}", 1.0, event["step"])
            self._writer.add_text(f"events/{event['kind']}", event_text(event), event["step"])

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["step"] <= self._step:  # the run went back
            self._writer.close()
            self._open(record["step"])
        self._step = record["step"]
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and value is not None:
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        self._writer.close()
