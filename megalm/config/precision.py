"""Number formats."""

from dataclasses import dataclass

from megalm.config.fields import choice


@dataclass
class PrecisionConfig:
    """The dtype of weights and activations; masters, gradients' sums and optimizer state are fp32."""

    dtype: str = choice("fp32", "bf16")
    """fp32, or bf16 with fp32 master weights."""
