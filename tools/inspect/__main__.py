"""Command line of `megalm inspect`; a path in place of the command is looked at as what it is."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .. import inspect
from ..subcommands import find_subcommands, run_tool


def add_command(arguments: Sequence[str]) -> list[str]:
    """`PATH ...` becomes `checkpoint PATH ...` or `data PATH ...` where the path holds one of these."""
    given = list(arguments)
    if not given or given[0].startswith("-") or given[0] in find_subcommands(inspect):
        return given
    path = Path(given[0])
    if (path / "manifest.json").exists() or (path / "checkpoints").is_dir() or list(path.glob("step-*")):
        return ["checkpoint", *given]
    if path.suffix in (".idx", ".bin", ".npy", ".ds") or path.with_name(path.name + ".idx").exists():
        return ["data", *given]
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    return run_tool(inspect, add_command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
