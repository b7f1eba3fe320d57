"""What a setting decides: written beside each field of the configuration as its type, `rope_theta: Function[float]`.

A field that holds further settings may say it for all of them (`guard: Course[GuardConfig]`). Hydra does not see these
words: they are `typing.Annotated`. `megalm.config.changes` compares two configurations by them.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args

T = TypeVar("T")


class Effect(Enum):
    """What changes in a run that goes on with another value; the value says it in words."""

    FIXED = "the weights or the order of the data are other ones: a run cannot go over to it"
    FUNCTION = "the model computes something else with the same weights"
    ORDER = "other data is seen, or the same in another order"
    CONTENT = "the data decides by what it holds, wherever it lies: the loader compares it"
    COURSE = "the weights move otherwise from here on"
    LAYOUT = "the work is done otherwise, and gives the same but for rounding"
    MEASURED = "something else is measured or shown"
    START = "it had its effect when the run began, and has none any more"
    ASIDE = "nothing of the training"

    @property
    def refused(self) -> bool:
        """Whether a run goes on with another value only where that is asked for (or not at all)."""
        return self in (Effect.FIXED, Effect.FUNCTION, Effect.ORDER)

    @property
    def silent(self) -> bool:
        """Whether nobody need be told of another value."""
        return self in (Effect.CONTENT, Effect.ASIDE)


Fixed = Annotated[T, Effect.FIXED]
Function = Annotated[T, Effect.FUNCTION]
Order = Annotated[T, Effect.ORDER]
Content = Annotated[T, Effect.CONTENT]
Course = Annotated[T, Effect.COURSE]
Layout = Annotated[T, Effect.LAYOUT]
Measured = Annotated[T, Effect.MEASURED]
Start = Annotated[T, Effect.START]
Aside = Annotated[T, Effect.ASIDE]


def list_effects(config: Any, prefix: str = "", inherited: Effect | None = None) -> Iterator[tuple[str, Effect | None]]:
    """(dotted key, what it decides) of every setting in a configuration; None where nobody has said it."""
    for field in fields(config):
        own = next((word for word in get_args(field.type)[1:] if isinstance(word, Effect)), inherited)
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from list_effects(value, f"{key}.", own)
        else:
            yield key, own
