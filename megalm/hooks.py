"""What attaches to the training step: the guard, checkpoints, metrics, resilience. Each moment is one method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalm.trainer import Trainer


@dataclass(frozen=True)
class Signals:
    """What a step measured before its update, the same on every rank: one host synchronisation a step."""

    loss: float
    """Mean loss over the tokens of the global batch, nats."""
    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    nonfinite: float
    """Gradient values that are NaN or infinite."""
    update_rms: float | None = None
    """Largest root mean square, over the tensors, of what the update would change their elements by; on a sample of each.
    None where it is not measured (guard=off)."""
    attention_logit: float | None = None
    """Largest attention logit, over a sample of the queries of every sequence, layer and head."""
    loss_spread: float | None = None
    """Largest mean loss of a data rank less their median, nats; None with one data rank."""
    worst_rank: int = -1
    """Data rank whose mean loss is largest; -1 where they are not told apart."""


class Hook:
    """Override the moments you need; every method does nothing by itself."""

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
