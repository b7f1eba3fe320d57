"""Watches the products in 8-bit floats: what their casts lose, and which of them meets a value that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megalm.parallel import collectives
from megalm.precision.meter import Seen
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.signals import Signals
    from megalm.train.trainer import Trainer

PREFIX = "fp8/"
"""Names of these numbers in a step's record begin with this."""


def describe(products: Sequence[Seen]) -> dict[str, float]:
    """Describe numbers for a step's record: of each layer, and of the worst of them.

    largest: magnitude of any operand; zeroed, saturated: the largest share of an operand's elements that becomes zero, or lies
    beyond the largest number.
    """
    found: dict[str, float] = {}
    for product in products:
        layer = product.name.split(".")[1]
        for key, values in (
            ("largest", product.largest),
            ("zeroed", product.zeroed),
            ("saturated", product.saturated),
        ):
            for name in (f"{PREFIX}{layer}/{key}", f"{PREFIX}{key}"):
                if values:
                    found[name] = max(found.get(name, 0.0), *values.values())
    return found


def explain(products: Sequence[Seen]) -> str:
    """Explain where values that are not finite were met first, forward and backward."""
    forward = [f"{product.name} ({' and '.join(found)})" for product in products if (found := _forward(product))]
    backward = [product.name for product in reversed(products) if "grad" in product.not_finite]
    if forward:
        return f"the first product with a value that is not finite is {forward[0]}; {len(forward)} of {len(products)} have one"
    if backward:
        return f"forward all operands are finite; the first product in backward with a gradient that is not is {backward[0]}"
    return "all operands of 8-bit products are finite: the value comes from elsewhere"


def _forward(product: Seen) -> list[str]:
    return [operand for operand in product.not_finite if operand != "grad"]


class Fp8Hook(Hook):
    """Puts what the casts lose into the step's record every so often, and names the products of a step that is not finite."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.measured: dict[str, float] = {}
        """For the record of the step under way."""

    @property
    def name(self) -> str:
        return "fp8"

    def on_step_start(self, trainer: Trainer) -> None:
        trainer.meters.begin(counting=self._is_due(trainer.step + 1))

    def on_gradients(self, trainer: Trainer, signals: Signals) -> bool:
        """Say where it came from, on the step itself; what is done about it is the guard's."""
        healthy, due = math.isfinite(signals.loss) and not signals.nonfinite, self._is_due(trainer.step + 1)
        if healthy and not due:
            return True
        seen = _collect(trainer)
        trainer.meters.begin(counting=False)  # what is evaluated after the step is none of it
        self.measured = describe(seen) if due else {}
        if healthy:
            return True
        trainer.events.write(
            "fp8",
            step=trainer.step + 1,
            cause="nonfinite",
            products=[product.name for product in seen if product.not_finite],
            text=explain(seen),
        )
        return True

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record.update(self.measured)
        self.measured = {}

    def _is_due(self, step: int) -> bool:
        """In the first step, too, whose numbers are those of the initial weights."""
        return self.every > 0 and (step % self.every == 0 or step == 1)


def _collect(trainer: Trainer) -> list[Seen]:
    def reduce(values: Tensor, operation: str) -> Tensor:
        return collectives.all_reduce(values, trainer.mesh.world, operation)

    return trainer.meters.collect(reduce, trainer.mesh.device)
