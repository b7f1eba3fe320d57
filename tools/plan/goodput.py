"""Failures, checkpoint interval, spares: how much of the time trains."""

from tools.plan._command import Command

_command = Command(
    "goodput",
    "failures, checkpoint interval, spares: how much of the time trains",
    [
        "gpus",
        "gpu",
        "failures",
        "observed_failures",
        "observed_nodes",
        "observed_days",
        "gpus_per_node",
        "mtti",
        "stall",
        "restart",
        "repair",
        "interval",
        "spares",
        "days",
    ],
    "python -m tools.plan goodput gpus=3072 failures=1 stall=60s days=30",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
