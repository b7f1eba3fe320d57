"""Command line of `python -m tools.inspect`."""

import sys

import tools.inspect
from tools.subcommands import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(tools.inspect))
