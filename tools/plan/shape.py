"""Exact parameters of a model, tensor by tensor."""

from tools.plan._command import Command

_command = Command(
    "shape",
    "exact parameters of a model, tensor by tensor",
    ["seq_length"],
    "python -m tools.plan shape +model=7b",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
