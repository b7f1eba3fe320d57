"""The numbers of metrics.jsonl as TensorBoard scalars."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.hooks import Hook

if TYPE_CHECKING:
    from megalm.trainer import Trainer


class TensorBoardHook(Hook):
    """Writes each number of a step's record as a scalar named train/NAME, or as it is where it has a folder (eval/loss)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: "Trainer") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and value is not None:
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        self._writer.close()
