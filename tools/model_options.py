"""Options of the tools that run a model. torch is imported when one runs, not for `--help`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="number format to compute in (default float32)"
    )


def choose_device(given: str | None) -> str:
    """Choose the device that was asked for, or a GPU where there is one."""
    import torch

    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def read_dtype(name: str) -> "torch.dtype":
    """torch's number format of that name."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
