"""Sizes, tokens and learning rates of a scaling ladder; writes the experiments."""

from tools.plan._command import Command

_command = Command(
    "ladder",
    "sizes, tokens and learning rates of a scaling ladder; writes the experiments",
    ["rungs", "ratio", "gpus", "gpu", "mfu", "price", "price_list", "out"],
    "python -m tools.plan ladder model=30b rungs=5 out=ladder-30b",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
