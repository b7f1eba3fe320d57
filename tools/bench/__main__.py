"""Command line of `python -m tools.bench`."""

import sys

import tools.bench
from tools.subcommands import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(tools.bench))
