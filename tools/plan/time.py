"""Seconds of a step and days of a run."""

from tools.plan._command import Command

_command = Command(
    "time",
    "seconds of a step and days of a run",
    [
        "tokens",
        "parameters",
        "gpus",
        "gpu",
        "peak",
        "dtype",
        "mfu",
        "convention",
        "price",
        "price_list",
        "batch_tokens",
        "seq_length",
    ],
    "python -m tools.plan time +model=7b tokens=140e9 gpus=64 gpu=a100-40gb mfu=0.507 --json",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
