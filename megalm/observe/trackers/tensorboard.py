"""A run in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megalm.config import Config

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files into a folder.

    Where the run goes back, TensorBoard forgets what was written of the steps that come again, events included. The scalars
    of the abandoned steps go to a run of their own, `gone_back/1` and so on, which can be shown beside the run or be
    switched off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, config: Config, step: int) -> None:
        self._open(step)

    def _open(self, step: int) -> None:
        self._writer = _writer(self.folder, step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def go_back(self, step: int, number: int, abandoned: dict[int, dict[str, float]]) -> None:
        self._writer.close()
        if abandoned:
            with _writer(self.folder / "gone_back" / str(number)) as beside:
                for at, values in abandoned.items():
                    for name, value in values.items():
                        beside.add_scalar(name, value, at)
        self._open(step)

    def close(self) -> None:
        self._writer.close()


def _writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # a second to import, for runs that ask for it alone

    return SummaryWriter(str(folder), purge_step=purge_step)
