"""Command line of `megalm dedup`."""

import os
import sys
from collections.abc import Sequence

from .. import dedup
from ..interruption import INTERRUPTED, interrupt_promptly
from ..subcommands import run_tool


def add_command(arguments: Sequence[str]) -> list[str]:
    """`--against EVAL` without a command is the command `against` with `--evaluation EVAL`; it may be given more than once."""
    if not any(item == "--against" or item.startswith("--against=") for item in arguments):
        return list(arguments)
    rest, evaluation, following = [], [], iter(arguments)
    for item in following:
        if item == "--against":
            evaluation += [path for path in [next(following, None)] if path is not None]
        elif item.startswith("--against="):
            evaluation.append(item.partition("=")[2])
        else:
            rest.append(item)
    return ["against", *(rest[1:] if rest[:1] == ["against"] else rest), "--evaluation", *evaluation]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input, 130 interrupted (the same command goes on)."""
    # numpy's library starts a thread for each core otherwise, which costs a short run a sixth of its time; the
    # workers, which inherit this, are the parallelism
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = add_command(sys.argv[1:] if arguments is None else arguments)
    with interrupt_promptly():
        status = run_tool(dedup, arguments)
    if status == INTERRUPTED and any(item.startswith(("--output", "--removed")) for item in arguments):
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
