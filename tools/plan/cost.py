"""Dollars of GPUs, of people's data and of storage."""

from tools.plan._command import Command

_command = Command(
    "cost",
    "dollars of GPUs, of people's data and of storage",
    [
        "tokens",
        "finetune_tokens",
        "parameters",
        "gpus",
        "gpu",
        "peak",
        "dtype",
        "mfu",
        "convention",
        "price",
        "price_list",
        "days",
        "hours",
        "batch_tokens",
        "seq_length",
        "instruction_pairs",
        "comparisons",
        "multi_turn_chats",
        "annotation_hours",
        "checkpoints",
        "storage_days",
    ],
    "python -m tools.plan cost tokens=1e12 gpus=440 gpu=a100-40gb days=9.5 parameters=6.65e9",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
