"""The best model and token count for a budget."""

from tools.plan._command import Command

_command = Command(
    "budget",
    "the best model and token count for a budget",
    [
        "dollars",
        "gpu_days",
        "gpu_hours",
        "gpus",
        "gpu",
        "peak",
        "dtype",
        "mfu",
        "price",
        "price_list",
        "inference_tokens",
        "inference_mfu",
        "law",
        "ratio",
        "tokens",
        "seq_length",
    ],
    "python -m tools.plan budget dollars=1M gpu=h100 mfu=0.4 inference_tokens=2T",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
