"""Each field held against its own declaration: the list of its words, the range of its numbers."""

import math
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.fields import Range


def check_fields(node: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first word or number, in this dataclass or those within, that its field does not hold."""
    for f in fields(node):
        value, path = getattr(node, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            check_fields(value, f"{path}.")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for number, item in enumerate(value):
                check_fields(item, f"{path}[{number}].")
        elif "choices" in f.metadata and value not in f.metadata["choices"]:
            close = get_close_matches(str(value), f.metadata["choices"], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{path}={value}: not one of {', '.join(f.metadata['choices'])}.{hint}")
        elif "range" in f.metadata:
            _check_numbers(path, value, f)


def _check_numbers(path: str, value: Any, f: Field[Any]) -> None:
    allowed: Range = f.metadata["range"]
    several = isinstance(value, (list, tuple, dict))
    for number in (value.values() if isinstance(value, dict) else value) if several else [value]:
        if not isinstance(number, int | float) or number in allowed:
            continue
        finite = "" if math.isfinite(number) or allowed.infinite else " and finite"
        default = f.default if isinstance(f.default, int | float) else None
        way = f" Leave it out for the default, {default:g}." if default is not None and not several else ""
        which = " each number" if several else ""
        raise ConfigError(f"{path}={_shown(value)}:{which} must be {allowed}{finite}.{way}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {inner}" for name, inner in value.items()) + "}"
    return str(list(value)) if isinstance(value, list | tuple) else str(value)
