"""How a tool finds its subcommands: each module of its folder, or of a folder in it, with HELP, add_arguments and run."""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError, full_disk


def modules(package: ModuleType) -> dict[str, str]:
    """Name of each subcommand -> the module that is it, from the tool's folder and the folders in it."""
    found = {}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        name = module.name.rpartition(".")[2]
        if not module.ispkg and not name.startswith("_"):
            found[name] = module.name
    return dict(sorted(found.items()))


def run_tool(package: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Parse the command line, import only the subcommand that was asked for, and run it.

    Exit status: what the subcommand returns; 2 with one message when the input is wrong.
    """
    escape_what_cannot_be_written()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = package.__name__
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=package.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    available = modules(package)
    loaded = {}
    for command in available if wanted not in available else [wanted]:
        module = importlib.import_module(available[command])
        loaded[command] = module
        subparser = subparsers.add_parser(command, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
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
        explained = full_disk(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
