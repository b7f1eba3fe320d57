"""Watches the load of a mixture's experts: a router that sends nearly all tokens to a few of them is collapsing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megalm.config.guard import GuardConfig
from megalm.config.model import MoEConfig
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


@dataclass(frozen=True)
class Collapse:
    """A layer whose router has sent too little to too many experts, for too long."""

    layer: int
    dead: int
    max_load: float
    since: int
    """First step of it."""


class RouterWatch:
    """Counts, for each layer, the steps in a row with a share of experts without any token of the global batch.

    A step alone says little: in the first steps all tokens look alike to a router, and a selection bias needs some time.
    """

    def __init__(self, moe: MoEConfig, share: float, patience: int) -> None:
        """share: of the experts, without a token, from which a step counts; patience: such steps in a row."""
        self.moe, self.share, self.patience = moe, share, patience
        self.began: dict[int, int] = {}
        """First step of each layer's present streak."""
        self.told: set[int] = set()
        """Layers of which the present streak is told."""

    def see(self, step: int, record: Mapping[str, Any]) -> list[Collapse]:
        """Take a step's record; gives the layers that collapse, each once until it has recovered."""
        found = []
        for key, dead in record.items():
            words = key.split("/")
            if len(words) != 3 or words[0] != "router" or words[2] != "dead":
                continue
            layer = int(words[1])
            if dead < self.share * self.moe.num_experts:
                self.began.pop(layer, None)
                self.told.discard(layer)
                continue
            since = self.began.setdefault(layer, step)
            if step - since + 1 >= self.patience and layer not in self.told:
                self.told.add(layer)
                found.append(Collapse(layer, int(dead), float(record[f"router/{layer}/max_load"]), since))
        return found

    def explain(self, collapse: Collapse, step: int) -> str:
        """Explain what it means, and what helps."""
        moe = self.moe
        bias = f"model.moe.bias_rate={moe.bias_rate * 10:g}, " if moe.selection_bias else ""
        loss = f"model.moe.balance_loss={max(moe.balance_loss * 10, 1e-3):g}"
        return (
            f"the router of layer {collapse.layer} has sent no token to {collapse.dead} of {moe.num_experts} experts, and "
            f"{collapse.max_load:.1f} times the mean to one, for {step - collapse.since + 1} steps: the others do not learn. "
            f"Pull the load together ({bias}{loss}), or lower optim.lr"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"began": {str(layer): step for layer, step in self.began.items()}, "told": sorted(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.began = {int(layer): step for layer, step in state.get("began", {}).items()}
        self.told = set(state.get("told", ()))


class RouterHook(Hook):
    """Writes an event for a router that collapses."""

    def __init__(self, guard: GuardConfig, moe: MoEConfig) -> None:
        self.watch = RouterWatch(moe, guard.router_dead, guard.router_patience)

    @property
    def name(self) -> str:
        return "router"

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        for collapse in self.watch.see(trainer.step, record):
            trainer.events.write(
                "router",
                step=trainer.step,
                cause="collapse",
                layer=collapse.layer,
                onset=collapse.since,
                dead=collapse.dead,
                max_load=collapse.max_load,
                text=self.watch.explain(collapse, trainer.step),
            )

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)
