"""logs/rank-N.log: what a rank has to say."""

import logging
import logging.handlers
from pathlib import Path

from megalm.train.hooks import Hook
from megalm.train.trainer import Trainer


class RankLog(logging.handlers.MemoryHandler):
    """logs/rank-N.log. Lines wait in memory until the run trains (`OpenRankLog`), or something is wrong: a start that does
    not come to train leaves the folder as it was."""

    def __init__(self, path: Path) -> None:
        file = logging.FileHandler(path, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        super().__init__(1000, flushLevel=logging.WARNING, target=file, flushOnClose=False)

    def open(self) -> None:
        """Write what waits, and from now on each line at once."""
        self.capacity = 0
        self.flush()

    def close(self) -> None:
        file = self.target
        super().close()
        if file is not None:
            file.close()


class OpenRankLog(Hook):
    """Opens the rank's log when the run trains."""

    def __init__(self, rank_log: RankLog) -> None:
        self.rank_log = rank_log

    def on_train_start(self, trainer: Trainer) -> None:
        self.rank_log.open()
