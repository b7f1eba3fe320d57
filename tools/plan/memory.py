"""Bytes on each GPU, by pipeline stage and part."""

from tools.plan._command import Command

_command = Command(
    "memory",
    "bytes on each GPU, by pipeline stage and part",
    ["gpus", "gpu", "seq_length", "batch_tokens", "snapshots"],
    "python -m tools.plan memory +model=30b gpus=64 gpu=h100 parallel.tensor=8 parallel.recompute=full",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
