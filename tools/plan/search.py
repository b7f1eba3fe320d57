"""Every valid layout, pruned by memory, ranked by time."""

from tools.plan._command import Command

_command = Command(
    "search",
    "every valid layout, pruned by memory, ranked by time",
    ["gpus", "gpu", "batch_tokens", "seq_length", "price", "price_list", "tokens", "top", "micro_batch"],
    "python -m tools.plan search model=30b gpus=512 gpu=h100 batch_tokens=4M",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
