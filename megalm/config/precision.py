"""Number formats."""

from dataclasses import dataclass
from typing import ClassVar

from megalm.config.fields import choice

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of one element of weights and activations (fp8 products are stored as bf16)."""


@dataclass
class PrecisionConfig:
    """The dtype of weights and activations; masters, gradients' sums and optimizer state are fp32."""

    dtype: str = choice("fp32", "bf16", "auto")
    """fp32, or bf16 with fp32 master weights; auto: bf16 on GPUs, fp32 on a CPU."""

    dtype_chosen: ClassVar[bool] = False
    """True on an instance whose dtype nobody gave: it is fp32 until the machine is known."""

    def __post_init__(self) -> None:
        """Keep in mind that the machine decides; until then, what every machine can do."""
        if self.dtype == "auto":
            self.dtype, self.dtype_chosen = "fp32", True  # type: ignore[misc]
