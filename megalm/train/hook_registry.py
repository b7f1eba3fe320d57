"""Hooks of plugins: what builds them, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalm.config import Config
from megalm.config.registry import Registry
from megalm.train.hooks import Hook

BuildHook = Callable[[Config, Path], Hook | None]
"""Makes a hook of a run's resolved configuration and its folder; None where the run does not want it. Alike on every rank."""

HOOKS: Registry[BuildHook] = Registry("hook", "run.plugins")


def register_hook(name: str, build: BuildHook) -> None:
    """Attach a hook to every run whose configuration `build` makes one of, on every rank, behind the guard and before what
    writes a step's record: what it adds to a record is written. Its settings are `run.plugin_options`.

    Errors: ValueError where the name is taken.
    """
    HOOKS.register(name, build)


def build_registered_hooks(config: Config, folder: Path) -> list[Hook]:
    """Build the hooks of plugins for this run, in the order of their names."""
    built = [HOOKS[name](config, folder) for name in sorted(HOOKS)]
    return [hook for hook in built if hook is not None]
