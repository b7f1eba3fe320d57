"""Code of a user's own that joins in without a fork: modules that register what they have when they are imported.

They are found in three places: the entry points of installed packages (group `megalm.plugins`), `$MEGALM_PLUGINS`, and a
run's `run.plugins`; in every process of a run alike. A module is looked for as Python does, then in the current folder.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from megalm.config.errors import ConfigError

GROUP = "megalm.plugins"
VARIABLE = "MEGALM_PLUGINS"

_LOADED: set[str] = set()


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Import the plugins of installed packages, of the environment, and these modules; each once in a process.

    Errors: ConfigError for a module that is not there, or that fails.
    """
    for point in _find_entry_points():
        _load(point.module, f"the plugin {point.name!r} of an installed package", "Uninstall or mend that package")
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for module in named:
        _load(module, f"{VARIABLE}={module}", "Correct the variable, or unset it")
    for module in modules:
        _load(module, f"run.plugins=[{module}]", "Install its package, or start in the folder that holds it")


def list_loaded() -> list[str]:
    """List names of the modules that were loaded in this process."""
    return sorted(_LOADED)


def _find_entry_points() -> Iterable[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _load(module: str, asked: str, way_out: str) -> None:
    if module in _LOADED:
        return
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # the last place, where it hides nothing
    try:
        importlib.import_module(module)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigError(f"{asked}: it needs {error.name}, which is not installed. {way_out}.") from error
        raise ConfigError(f"{asked}: there is no module {error.name}. {way_out}.") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{asked}: importing it fails at {place.filename}, line {place.lineno}: {type(error).__name__}: {error}. "
            f"{way_out}."
        ) from error
    _LOADED.add(module)
