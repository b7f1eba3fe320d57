"""Command line of `python -m tools.bench`."""

import sys
from collections.abc import Sequence

from .. import bench
from ..subcommands import run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit status."""
    return run_tool(bench, arguments)


if __name__ == "__main__":
    sys.exit(main())
