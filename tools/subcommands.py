"""How a tool finds its subcommands: each module of its folder, or of a folder in it, with HELP, add_arguments and run.

A tool may take modules of another folder for subcommands: `ELSEWHERE = {package: wrap}` in its `__init__.py`, where
`wrap(module)` has HELP, add_arguments and run.
"""

import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError, explain_full_disk

from .arguments import ArgumentParser


@dataclass(frozen=True)
class Subcommand:
    """A module that is a subcommand, before it is imported."""

    load: Callable[[], Any]
    module: str

    def read_help(self) -> str:
        """Its sentence for `--help`, read from the source: no subcommand is imported (some need torch) to list them all."""
        spec = importlib.util.find_spec(self.module)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["HELP"]:
                    return str(ast.literal_eval(node.value))
        return str(self.load().HELP)


def find_subcommands(package: ModuleType) -> dict[str, Subcommand]:
    """Name of each subcommand -> where it is, from the tool's folder, the folders in it, and what it has ELSEWHERE."""
    found: dict[str, Subcommand] = {}
    for folder, wrap in {package: None, **getattr(package, "ELSEWHERE", {})}.items():
        for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
            name = module.name.rpartition(".")[2]
            if not module.ispkg and not name.startswith("_"):
                found[name] = Subcommand(partial(_load, module.name, wrap), module.name)
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
    parser = ArgumentParser(prog=program, description=package.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    available = find_subcommands(package)
    chosen = None
    for command, subcommand in available.items():
        if command == wanted:
            chosen = subcommand.load()
            chosen.add_arguments(subparsers.add_parser(command, help=chosen.HELP, description=chosen.HELP))
        elif wanted not in available:
            subparsers.add_parser(command, help=subcommand.read_help())
    parsed = parser.parse_args(arguments)
    assert chosen is not None, "argparse lets no other command through"
    return run_reporting(lambda: chosen.run(parsed))


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
