"""Keeps what follows from a model alone: the planner's search asks for it a hundred thousand times."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

from megalm.config.model import ModelConfig

Found = TypeVar("Found")
_MOST = 4096
"""Models that are remembered at a time; a search looks at a few, a table of shapes at some thousands."""
_GROUPS = tuple(field.name for field in fields(ModelConfig) if is_dataclass(field.default_factory))


def cache_by_model(function: Callable[[ModelConfig], Found]) -> Callable[[ModelConfig], Found]:
    """Call `function` once for models with equal values, and give all of them the same object."""
    known: dict[tuple[Any, ...], Found] = {}

    @wraps(function)
    def ask(model: ModelConfig) -> Found:
        key = _values(model)
        if key not in known:
            if len(known) >= _MOST:
                known.clear()
            known[key] = function(model)
        return known[key]

    return ask


def _values(model: ModelConfig) -> tuple[Any, ...]:
    """The configuration's values as they are now, for it can be changed later; those of the groups in it spread out."""
    groups = {name: tuple(map(_fixed, vars(getattr(model, name)).values())) for name in _GROUPS}
    return tuple(map(_fixed, {**vars(model), **groups}.values()))


def _fixed(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value
