"""Fit a scaling law to finished runs and extrapolate with its uncertainty."""

from tools.plan._command import Command

_command = Command(
    "fit",
    "fit a scaling law to finished runs and extrapolate with its uncertainty",
    ["parameters", "tokens", "form"],
    "python -m tools.plan fit runs/a runs/b runs/c parameters=30e9 tokens=600e9",
    files="RUN",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
