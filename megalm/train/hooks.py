"""What attaches to the training step: the guard, metrics, resilience. Each moment is one method.

A hook's place among the others is the order of `Trainer.hooks`; the run's own are listed in `megalm.launch.attach`.
"""

from typing import TYPE_CHECKING, Any

from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class Hook:
    """Override the moments you need; every method does nothing by itself."""

    @property
    def name(self) -> str:
        """What the hook is called, and its state kept by, in every checkpoint: a class that has a state says it."""
        return type(self).__name__

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

    def on_evaluation(self, trainer: "Trainer", values: dict[str, float]) -> None:
        """The step is complete and held-out loss was measured after it: `values`, which its record will hold too."""

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """The step is complete; `record` is its line of metrics.jsonl and may still be added to."""

    def on_checkpoint(self, trainer: "Trainer", step: int) -> None:
        """The state of this step is copied for a checkpoint, which becomes durable meanwhile or was already."""

    def on_event(self, event: dict[str, Any]) -> None:
        """An event is on the disk, at any moment; on rank 0 alone. What fails here is logged, and the run goes on."""

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        """The run stops, with this exit status; called on errors too, where `on_train_start` had come to its end."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: small and JSON-able, the same on every rank; kept in the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; {} when the checkpoint holds nothing of this hook."""


def collect_states(hooks: list[Hook]) -> dict[str, Any]:
    """Collect each hook's state by its name, where it has one."""
    return {hook.name: state for hook in hooks if (state := hook.state_dict())}


def state_of(hook: Hook, states: dict[str, Any]) -> dict[str, Any]:
    """The hook's part of `collect_states`; an earlier version kept it by the hook's class. {} where there is none."""
    return states.get(hook.name) or states.get(type(hook).__name__, {})


def check_names(hooks: list[Hook]) -> None:
    """Errors: ValueError where two hooks that keep a state have one name, under which only one could be kept."""
    names = [hook.name for hook in hooks if type(hook).state_dict is not Hook.state_dict]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two hooks keep their state under the name {twice[0]!r}: give one of them a name of its own.")
