"""A run in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.config import Config
from megalm.observe.trackers.lineage import describe_settings
from megalm.observe.trackers.tracker import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Tracker):
    """Writes event files into a folder.

    Where the run goes back, TensorBoard forgets what was written of the steps that come again, events included. The scalars
    of the abandoned steps go to a run of their own, `gone_back/1` and so on, which can be shown beside the run or be
    switched off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, config: Config, step: int) -> None:
        self._open(step)
        self._show_settings(config)

    def _show_settings(self, config: Config) -> None:
        """The tab of hyperparameters, in the run itself: torch's add_hparams makes a second run of another name."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, bool | int | float | str) else str(value)
                 for key, value in describe_settings(config).items()}  # fmt: skip
        for summary in hparams(plain, {"train/loss": 0.0, "eval/loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

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

    def finish(self, status: int, files: Sequence[Path]) -> None:
        self._writer.close()


def _writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # a second to import, for runs that ask for it alone

    return SummaryWriter(str(folder), purge_step=purge_step)
