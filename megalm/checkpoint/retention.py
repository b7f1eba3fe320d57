"""Which checkpoints are deleted, and when: never the newest that has proved good, whatever was saved after it."""

from contextlib import suppress

from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.store import Store
from megalm.config import CheckpointConfig


class Retention:
    """Deletes what `checkpoint.keep` and `keep_every` give up. On rank 0.

    A run that learned nothing from a checkpoint yet cannot know that it is a good one: the update before it may have
    ruined the weights, and the next step's loss is the first to tell. So a run says how far its states have proved good
    (`trusted`); a checkpoint of a later step lies beside those that are kept, and deletes none of them.
    """

    def __init__(self, store: Store, config: CheckpointConfig) -> None:
        self.store, self.config = store, config
        self.newest = 0
        """Step of the last save that was begun."""
        self.trusted: int | None = None
        """Last step whose state has proved good; None: all of them."""
        self._held_back = False  # something was left out that was not trusted yet

    @property
    def due(self) -> bool:
        """Whether what was held back has proved good meanwhile."""
        return self._held_back and (self.trusted is None or self.trusted >= self.newest)

    def apply(self) -> None:
        """Delete what is not kept. An old one that cannot be deleted is no failure of the new one, which is durable."""
        self._held_back = self.trusted is not None and self.trusted < self.newest
        with suppress(OSError, CheckpointError):
            self.store.retain(self.config.keep, self.config.keep_every, self.trusted)

    def make_room(self) -> bool:
        """On a full disk: delete before the next commit what would go after it; whether there was anything.

        The newest good one stays: until the next is durable, it is the only one.
        """
        self.store.clear()
        with suppress(OSError, CheckpointError):
            keep = self.config.keep
            return bool(keep and self.store.retain(max(1, keep - 1), self.config.keep_every, self.trusted))
        return False
