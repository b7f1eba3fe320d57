"""What only shows a run must not end it: a full disk under a redirected console, a broken pipe, a fault of its own."""

import logging
from typing import TYPE_CHECKING, Any

from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

log = logging.getLogger(__name__)


class Bystander(Hook):
    """Attaches a hook that watches one rank alone; where it fails, that is logged and it is not asked again.

    Only for hooks that change nothing and meet no other rank: one that takes part in a collective must fail loudly.
    """

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.failed = False

    @property
    def name(self) -> str:
        return self.hook.name

    def on_resume(self, trainer: "Trainer") -> None:
        self._ask("on_resume", trainer)

    def on_complete(self, trainer: "Trainer") -> None:
        self._ask("on_complete", trainer)

    def on_train_start(self, trainer: "Trainer") -> None:
        self._ask("on_train_start", trainer)

    def on_evaluation(self, trainer: "Trainer", values: dict[str, float]) -> None:
        self._ask("on_evaluation", trainer, values)

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        self._ask("on_step_end", trainer, record)

    def on_checkpoint(self, trainer: "Trainer", step: int) -> None:
        self._ask("on_checkpoint", trainer, step)

    def on_event(self, event: dict[str, Any]) -> None:
        if not self.failed:
            self.hook.on_event(event)

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        self._ask("on_train_end", trainer, status)

    def _ask(self, moment: str, trainer: "Trainer", *more: Any) -> None:
        if self.failed and moment != "on_train_end":  # what it holds open is closed all the same
            return
        try:
            getattr(self.hook, moment)(trainer, *more)
        except Exception as error:
            self.failed = True
            name = self.hook.name
            log.exception("%s failed in %s at step %d; the run goes on without it", name, moment, trainer.step)
            text = f"{name} failed and shows nothing more ({type(error).__name__}: {error}); the run goes on"
            trainer.events.write("warning", step=trainer.step, what="observer", text=text)
