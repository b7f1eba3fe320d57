"""How a tool finds its subcommands: each module of its folder, or of a folder in it, with HELP, add_arguments and run.

A tool may take modules of another folder for subcommands: `ELSEWHERE = {package: wrap}` in its `__init__.py`, where
`wrap(module)` has HELP, add_arguments and run.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError, explain_full_disk


def find_subcommands(package: ModuleType) -> dict[str, Callable[[], Any]]:
    """Name of each subcommand -> what imports it, from the tool's folder, the folders in it, and what it has ELSEWHERE."""
    found: dict[str, Callable[[], Any]] = {}
    for folder, wrap in {package: None, **getattr(package, "ELSEWHERE", {})}.items():
        for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
            name = module.name.rpartition(".")[2]
            if not module.ispkg and not name.startswith("_"):
                found[name] = partial(_load, module.name, wrap)
    return dict(sorted(found.items()))


def _load(name: str, wrap: Callable[[ModuleType], Any] | None) -> Any:
    module = importlib.import_module(name)
    return wrap(module) if wrap else module


def run_tool(package: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Parse the command line, import only the subcommand that was asked for, and run it.

    Exit status: what the subcommand returns; 2 with one message when the input is wrong.
    """
    escape_what_cannot_be_written()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = package.__name__.rpartition(".")[2]
    program = "python -m tools.bench" if name == "bench" else f"megalm {name}"
    parser = argparse.ArgumentParser(prog=program, description=package.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    available = find_subcommands(package)
    loaded = {}
    for command in available if wanted not in available else [wanted]:
        loaded[command] = available[command]()
        subparser = subparsers.add_parser(command, help=loaded[command].HELP, description=loaded[command].HELP)
        loaded[command].add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    return run_reporting(lambda: loaded[parsed.command].run(parsed))


def run_reporting(action) -> int:
    """Run `action`; a ConfigError becomes one message on standard error and exit status 2."""
    escape_what_cannot_be_written()
    try:
        return int(action() or 0)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except PermissionError as error:
        print(
            f"error: {error.filename}: {error.strerror}. Change who may use it, or choose another place.",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        explained = explain_full_disk(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
