"""What attaches to the training step: the guard, checkpoints, metrics, resilience. Each moment is one method."""

from typing import TYPE_CHECKING, Any

from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class Hook:
    """Override the moments you need; every method does nothing by itself."""

    def on_resume(self, trainer: "Trainer") -> None:
        """The state that the run goes on from is loaded (or it begins anew); the place to go back further."""

    def on_complete(self, trainer: "Trainer") -> None:
        """Nothing is left to train: no other method follows, and nothing may be written to the run's folder."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Model, optimizer, data and resumed state are ready; no step was made yet."""

    def on_step_start(self, trainer: "Trainer") -> None:
        """A step is about to fetch its batch."""

    def on_gradients(self, trainer: "Trainer", signals: Signals) -> bool:
        """Gradients are reduced and not applied yet. False refuses the update. All ranks must answer alike."""
        return True

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """The step is complete; `record` is its line of metrics.jsonl and may still be added to."""

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        """The run stops, with this exit status; called on errors too, where `on_train_start` had come to its end."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: small and JSON-able, the same on every rank; kept in the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; {} when the checkpoint holds nothing of this hook."""
