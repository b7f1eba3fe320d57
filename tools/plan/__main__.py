"""Command line of `megalm plan`."""

import sys
from collections.abc import Sequence

from .. import plan
from ..subcommands import run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    return run_tool(plan, arguments)


if __name__ == "__main__":
    sys.exit(main())
