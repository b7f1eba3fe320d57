"""Words that a command line may have: groups with their choices, keys, and the values of keys that are chosen from a few."""

from __future__ import annotations

from megalm.config.groups import list_groups
from megalm.config.root import Config
from megalm.config.typed import find_kind, list_paths


def list_words() -> list[str]:
    """List `+model=tiny` and its like, `GROUP=CHOICE`, and of each key `key=` or, where it has choices, each `key=VALUE`."""
    words = []
    for group, choices in list_groups().items():
        sign = "+" if group in ("model", "experiment") else ""
        words += [f"{sign}{group}={choice}" for choice in choices if not choice.endswith("base")]
    for path in list_paths(Config):
        values = find_kind(Config, path.split(".")).choices
        words += [f"{path}={value}" for value in values] if values else [f"{path}="]
    return sorted(set(words))
