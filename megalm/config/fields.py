"""How a configuration field is declared: a default, the words or numbers it accepts, or that it must be given."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

MISSING = "???"
"""What a configuration holds where a value must be given; the kernels' and the model's users need no Hydra."""


@dataclass(frozen=True)
class Range:
    """Which numbers a field holds. Without `infinite` they are finite; NaN is never one of them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        upper = self.at_most is not None or self.below is not None
        if not upper and (self.above == 0 or self.at_least == 0):
            return "positive" if self.above == 0 else "0 or positive"
        bounds = [
            text.format(bound)
            for text, bound in (
                ("at least {:g}", self.at_least),
                ("above {:g}", self.above),
                ("at most {:g}", self.at_most),
                ("below {:g}", self.below),
            )
            if bound is not None
        ]
        return " and ".join(bounds) or "a number"


def choice(default: str, *others: str) -> Any:
    """A word out of a closed list; the first is the default. Checked by `megalm.config.validate`."""
    return field(default=default, metadata={"choices": (default, *others)})


def open_choice(default: str, registry: Collection[str]) -> Any:
    """Open a word out of a table that plugins add to: it is held against what the table has when a configuration is checked."""
    return field(default=default, metadata={"choices": registry})


def number(default: Any, **bounds: Any) -> Any:
    """A number, an optional one, or several (lists, tuples and dicts of numbers); each must lie within the bounds of `Range`.

    default: the value, or a function that makes it.
    """
    metadata = {"range": Range(**bounds)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(**bounds: Any) -> Any:
    """A number without a default: composing fails with the field's name when it is not given."""
    return number(MISSING, **bounds)
