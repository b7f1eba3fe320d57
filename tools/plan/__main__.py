"""Command line of `python -m tools.plan`."""

import sys

import tools.plan
from tools.subcommands import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(tools.plan))
