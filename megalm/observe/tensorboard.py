"""The numbers of metrics.jsonl as TensorBoard scalars."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.journal import QUIET, event_text, read_course, read_events
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from megalm.train.trainer import Trainer


class TensorBoardHook(Hook):
    """Writes each number of a step's record as a scalar named train/NAME, or as it is where it has a folder (eval/loss).

    Where the run goes back, TensorBoard forgets what was written of the steps that come again, events included. Those are
    written once more, and the scalars of the abandoned steps go to a run of their own, `gone_back/1` and so on, which can
    be shown beside the run or be switched off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: "Trainer") -> None:
        self._run = trainer.folder
        self._open(trainer.step + 1)
        trainer.events.listeners.append(self._mark)

    def _open(self, step: int) -> None:
        """Write from this step on; of what was written of it and later ones, only the events are shown again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step)
        self._step = step - 1
        for event in read_events(self._run / "events.jsonl"):
            if event["step"] >= step:
                self._mark(event)

    def _mark(self, event: dict[str, Any]) -> None:
        """A point at the event's step under events/KIND, and what it was as text."""
        if event["kind"] not in QUIET:
            self._writer.add_scalar(f"events/{event['kind']}", 1.0, event["step"])
            self._writer.add_text(f"events/{event['kind']}", event_text(event), event["step"])

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["step"] <= self._step:  # the run went back
            self._writer.close()
            self._keep_abandoned()
            self._open(record["step"])
        self._step = record["step"]
        _write(self._writer, record)

    def _keep_abandoned(self) -> None:
        """Write what the run went back on last as a run beside it. The step that it came back to is in metrics.jsonl."""
        from torch.utils.tensorboard import SummaryWriter

        abandoned = read_course(self._run / "metrics.jsonl").abandoned
        if not abandoned:
            return
        with SummaryWriter(str(self.folder / "gone_back" / str(len(abandoned)))) as beside:
            for record in abandoned[-1]:
                _write(beside, record)

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        self._writer.close()


def _write(writer: "SummaryWriter", record: dict[str, Any]) -> None:
    for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)):
            writer.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])
