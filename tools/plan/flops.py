"""FLOPs of training; MFU and HFU of a measured speed."""

from tools.plan._command import Command

_command = Command(
    "flops",
    "FLOPs of training; MFU and HFU of a measured speed",
    [
        "seq_length",
        "batch_tokens",
        "tokens",
        "gpus",
        "gpu",
        "peak",
        "tokens_per_second",
        "sequences_per_second",
        "convention",
        "parameters",
    ],
    "python -m tools.plan flops +model=7b gpus=64 gpu=a100-40gb tokens_per_second=233000",
)
HELP, add_arguments, run = _command.help, _command.add_arguments, _command.run
