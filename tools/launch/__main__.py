"""Command line of `megalm launch`."""

import sys
from collections.abc import Sequence

from .. import launch
from ..subcommands import run_tool


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 2 wrong input, and then nothing is written."""
    return run_tool(launch, arguments)


if __name__ == "__main__":
    sys.exit(main())
