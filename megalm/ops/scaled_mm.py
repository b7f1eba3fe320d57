"""Products of two matrices in 8-bit floats with scales: torch's where the device has it, else from what they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.backend import get_backend, require
from megalm.ops.quantize import TILE, WHOLE_ROW, Block, fp8_dequantize

_ROW_TILE, _TILE = (1, TILE), (TILE, TILE)
# What cuBLAS pads a column of a tile's scales to (PyTorch's pull request 166752).
_SCALES_AT_ONCE = 4
_ADVICE = (
    "Choose another precision.fp8.recipe, or ops.backend=reference, which multiplies what the 8-bit floats stand for."
)


class Scaled(NamedTuple):
    """A matrix in 8-bit floats: it stands for data * scale_inv, block by block. Shapes: data [M, K], scale_inv as `Quantized`"""

    data: Tensor
    scale_inv: Tensor
    block: Block

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What it stands for, rounded to `dtype`."""
        return fp8_dequantize(self.data, self.scale_inv, block=self.block, dtype=dtype)


def scaled_mm_reference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.mm(b.t()).to(dtype)


def scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """a b^T, summed in fp32 and rounded once to `dtype`.

    On a GPU it is torch's scaled_mm; sums are then kept in the tensor cores' own precision, with `fast` without adding parts
    of them in fp32. Elsewhere, and with ops.backend=reference, the matrices that stand for the operands are multiplied in
    fp32: the same but for the order of the sum.

    Shapes: a [M, K], b [N, K] -> [M, N]
    Errors: ConfigError for sizes that do not fit, and on a GPU that has no product for these blocks.
    """
    require(
        a.data.dim() == b.data.dim() == 2 and a.data.shape[1] == b.data.shape[1],
        f"scaled_mm: a is {tuple(a.data.shape)}, b {tuple(b.data.shape)}; they must be [M, K] and [N, K].",
    )
    if a.data.is_meta:
        return a.data.new_empty((a.data.shape[0], b.data.shape[0]), dtype=dtype)
    if not a.data.is_cuda or get_backend() == "reference":
        return scaled_mm_reference(a.dequantize(), b.dequantize(), dtype)
    return _multiply_on_device(a, b, dtype, fast)


def _multiply_on_device(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool) -> Tensor:
    require(hasattr(F, "scaled_mm"), f"this torch ({torch.__version__}) has no scaled_mm; 2.13 has. {_ADVICE}")
    kind: Any = F.ScalingType  # type: ignore[attr-defined]
    # Along rows the sums of torch's kernel come out as bf16 only.
    out = torch.bfloat16 if a.block == WHOLE_ROW else dtype
    if a.block is None and b.block is None:
        how = (a.scale_inv, kind.TensorWise, b.scale_inv, kind.TensorWise)
    elif a.block == b.block == WHOLE_ROW:
        how = (a.scale_inv, kind.RowWise, b.scale_inv.t(), kind.RowWise)
    elif a.block == _ROW_TILE and b.block == _TILE:
        how = (_turn(a.scale_inv), kind.BlockWise1x128, _pad(b.scale_inv).t(), kind.BlockWise128x128)
    elif a.block == b.block == _ROW_TILE:
        how = (_turn(a.scale_inv), kind.BlockWise1x128, _turn(b.scale_inv), kind.BlockWise1x128)
    else:
        require(False, f"scaled_mm: blocks {a.block} and {b.block} have no product on this device. {_ADVICE}")
    product: Tensor = F.scaled_mm(  # type: ignore[attr-defined]
        a.data, b.data.t(), *how, output_dtype=out, use_fast_accum=fast
    )
    return product.to(dtype)


def _turn(scales: Tensor) -> Tensor:
    """The same values with the rows' next to each other in memory."""
    return scales.t().contiguous().t()


def _pad(scales: Tensor) -> Tensor:
    """Rows of tiles' scales, each filled up to a multiple of four."""
    return F.pad(scales, (0, -scales.shape[1] % _SCALES_AT_ONCE))
