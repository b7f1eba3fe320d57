"""Command line of `python -m tools.dedup`."""

import sys

import tools.dedup
from tools.subcommands import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(tools.dedup))
