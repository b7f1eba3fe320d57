"""How a configuration field is declared: a default, the words it accepts, or that it must be given."""

from dataclasses import field
from typing import Any

MISSING = "???"
"""What Hydra's configurations hold where a value must be given; the kernels' and the model's users need no Hydra."""


def choice(default: str, *others: str) -> Any:
    """A word out of a closed list; the first is the default. Checked by `megalm.config.validate`."""
    return field(default=default, metadata={"choices": (default, *others)})


def required() -> Any:
    """A field without a default: composing fails with its name when it is not given."""
    return MISSING
