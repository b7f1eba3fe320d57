"""A table of named things that a plugin may add to: update rules, trackers, families of models, ..."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TypeVar

from megalm.config.errors import ConfigError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Names and what they stand for. `what` and `key` say in messages what is registered, and which key names it."""

    def __init__(self, what: str, key: str, entries: dict[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.what, self.key = what, key

    def register(self, name: str, entry: T) -> None:
        """Add an entry; the same one again does nothing (a module that is read twice).

        Errors: ValueError where the name stands for something else.
        """
        if self.get(name, entry) is not entry:
            raise ValueError(f"{self.what} {name!r} is there already: register yours under another name.")
        self[name] = entry

    def find(self, name: str) -> T:
        """Find the entry of this name. Errors: ConfigError with the nearest name, and all of them."""
        if name not in self:
            near = get_close_matches(name, self, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{self.key}={name}: there is no such {self.what}.{hint} Known are {', '.join(sorted(self))}; a package of "
                "your own adds one by run.plugins=[package.module]."
            )
        return self[name]
