"""Command line of `megalm evaluate`: a subcommand, or a model, which is then asked (`run`)."""

import sys
from collections.abc import Sequence

from ..subcommands import find_subcommands, run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    package = sys.modules[__package__ or ""]
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first not in ("-h", "--help") and first not in find_subcommands(package):
        arguments = ["run", *arguments]
    return run_tool(package, arguments or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
