"""Number formats."""

from dataclasses import dataclass, field
from typing import ClassVar

from megalm.config.effects import Layout, Measured
from megalm.config.fields import choice, number

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of one element of weights and activations (fp8 products are stored as bf16)."""


RECIPES = ("tensorwise", "rowwise", "rowwise_wide", "blockwise", "mxfp8")
"""How operands of 8-bit products are scaled; `megalm.precision.recipes` says each exactly."""


def find_multiple(recipe: str) -> int:
    """Find what sizes of matrices must be a multiple of: 16 bytes of a row, or 32 of a block that hardware takes."""
    return 32 if recipe == "mxfp8" else 16


@dataclass
class Fp8Config:
    """Products of layers with their weights in 8-bit floats. Embedding, output matrix, norms, router and attention's core
    stay as `precision.dtype` has them."""

    recipe: str = choice("none", *RECIPES)
    """What shares a scale: tensorwise, all of an operand; rowwise, a row along the dimension that is summed over;
    rowwise_wide, the same with the weights' gradients in precision.dtype; blockwise, 128 of a row and tiles of 128 x 128 of
    weights; mxfp8, 32 of a row. none: no 8-bit products."""
    skip: list[str] = field(default_factory=list)
    """Patterns of products that stay in precision.dtype, such as layers.*.attention.output or layers.3.*."""
    skip_first: int = number(0, at_least=0)
    """So many first layers stay in precision.dtype."""
    skip_last: int = number(0, at_least=0)
    """So many last layers stay in precision.dtype."""
    smallest: int = number(0, at_least=0)
    """Products whose weight has fewer rows or columns than this stay in precision.dtype: small ones lose by the
    conversions."""
    keep_weights: Layout[bool] = True
    """Quantise weights once a step, not in each micro-batch, and hold both forms of them meanwhile: 2 bytes a parameter of these
    products. Not with parallel.data_mode=fully_shard, whose weights are whole for a moment only."""
    measure_every: Measured[int] = number(50, at_least=0)
    """Steps from one to the next in which it is counted what the casts lose (fp8/* of metrics.jsonl); 0: never."""


@dataclass
class PrecisionConfig:
    """The dtype of weights and activations; masters, gradients' sums and optimizer state are fp32."""

    dtype: str = choice("fp32", "bf16", "auto")
    """fp32, or bf16 with fp32 master weights; auto: bf16 on GPUs, fp32 on a CPU."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """Products in 8-bit floats."""

    dtype_chosen: ClassVar[bool] = False
    """True on an instance whose dtype nobody gave: it is fp32 until the machine is known."""

    def __post_init__(self) -> None:
        """Keep in mind that the machine decides; until then, what every machine can do."""
        if self.dtype == "auto":
            self.dtype, self.dtype_chosen = "fp32", True  # type: ignore[misc]
