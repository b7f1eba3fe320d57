"""What a hook may do to the run, beside refusing an update: set the learning rate, end the run, have it saved."""

import math
from typing import Any


class RunControl:
    """Wishes of the hooks, which the trainer reads at its own moments. All ranks must wish alike, but for `request_stop`.

    To go back to an earlier state, a hook calls `trainer.restore`.
    """

    def __init__(self) -> None:
        self.status = 0
        """Exit status that the run is to end with, where that is not 0."""
        self.reason: str | None = None
        """Why, in a sentence for the person who started it."""
        self.stop_requested = False
        """This rank wants the run to end with a checkpoint; the ranks agree on it in the next step."""
        self.gradient_factor = 1.0
        """The gradients of the step under way are multiplied by this."""
        self._save_requested = False
        self._rate_factors: dict[str, float] = {}
        self._once: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------- what hooks call
    def set_rate_factor(self, name: str, factor: float) -> None:
        """From the next update on the scheduled learning rate is multiplied by this, until it is set again under this name.
        It is kept in the checkpoint."""
        self._rate_factors[name] = factor

    def jump_rate(self, name: str, factor: float) -> None:
        """Multiply the learning rate of the step under way alone; ask in `on_step_start`."""
        self._once[name] = factor

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of the step under way alone; ask in `on_step_start`."""
        self.gradient_factor *= factor

    def finish(self, status: int, reason: str | None = None) -> None:
        """End the run after the step under way, with this exit status: 3, and nothing more is saved; another, and the state
        is saved first."""
        self.status, self.reason = status, reason

    def request_stop(self) -> None:
        """End the run after the step under way, with a checkpoint and status 130; at any moment, from any rank."""
        self.stop_requested = True

    def request_save(self) -> None:
        """Save a checkpoint when the step under way is complete."""
        self._save_requested = True

    # -------------------------------------------------------------------------------------------- what the trainer calls
    @property
    def lr_scale(self) -> float:
        """Product of all factors on the scheduled learning rate."""
        return math.prod([*self._rate_factors.values(), *self._once.values()], start=1.0)

    def end_step(self) -> None:
        """The step is made: forget what was for it alone."""
        self._once.clear()
        self.gradient_factor = 1.0

    def take_save_request(self) -> bool:
        """Whether a hook asked for a checkpoint since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def state_dict(self) -> dict[str, Any]:
        """The lasting factors: their product, and each by its name."""
        return {"lr_scale": math.prod(self._rate_factors.values(), start=1.0), "lr_factors": dict(self._rate_factors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the factors back. An earlier version wrote their product alone, which the guard had set."""
        self._rate_factors = dict(state.get("lr_factors") or {"guard": state["lr_scale"]})
