"""Command line of `megalm posttrain`."""

import sys
from collections.abc import Sequence

from ..subcommands import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    return run_tool(sys.modules[__package__ or ""], argv)


if __name__ == "__main__":
    sys.exit(main())
