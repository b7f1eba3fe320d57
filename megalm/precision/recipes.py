"""Recipes: how each operand of a linear layer's three products becomes 8-bit floats.

Each product is a b^T of two matrices whose last dimension is the one that is summed over:

    forward          y  = x W^T         a = x [N, H]      b = W [F, H]
    input gradient   dx = dy W          a = dy [N, F]     b = W^T [H, F]
    weight gradient  dW = dy^T x        a = dy^T [F, N]   b = x^T [H, N]

so a block (1, n) lies along that dimension in all of them, and x, W and dy have another scale in each of the two products that
they enter, unless the block is the whole tensor or a square.

Sources: tensorwise: Transformer Engine's Float8CurrentScaling, torchao's tensorwise; rowwise, rowwise_wide: torchao's rowwise
and rowwise_with_gw_hp; blockwise: DeepSeek-V3 (arXiv:2412.19437), sec. 3.3; mxfp8: OCP Microscaling Formats 1.0, scales rounded
up as in NVIDIA's recipe (arXiv:2506.08027).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm import ops
from megalm.ops.quantize import MICROSCALED, TILE, WHOLE_ROW, Block, fp8_scale
from megalm.ops.scaled_mm import Scaled
from megalm.precision.product import Reduce

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@torch.no_grad()
def find_largest(x: Tensor, over: tuple[Reduce, ...] = ()) -> Tensor:
    """Find the largest magnitude of x, NaN or infinite where x has such a value; over: the ranks that have other parts of it.

    NaN must not get lost in the reduction, whose maximum may ignore it: it travels as infinity.

    Shapes: x [..] -> fp32 [1]
    """
    if not x.numel():
        largest = x.new_zeros(1, dtype=torch.float32)
    else:
        largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).view(1)
    if over:
        largest = largest.nan_to_num(nan=torch.inf, posinf=torch.inf)
    for reduce in over:
        largest = reduce(largest)
    return largest


@dataclass(frozen=True)
class Scaling:
    """How one operand becomes 8-bit floats."""

    block: Block
    """What shares a scale; None: the whole tensor, over all ranks that have a part of it."""
    dtype: torch.dtype = E4M3
    power_of_two: bool = True
    """Scales are powers of two, by which values are scaled without rounding."""

    def quantize(self, x: Tensor, largest: Tensor) -> Scaled:
        """x in 8-bit floats.

        largest: of the magnitudes of all ranks' parts of x. An operand with a value that is not finite stands for NaN
        everywhere, since the cast alone would make a large number of an infinity.

        Shapes: x [M, K], largest fp32 [1]
        """
        return self._quantize(x, largest, transpose=False)[0]

    def quantize_both(self, x: Tensor, turned: Scaling, largest: Tensor) -> tuple[Scaled, Scaled]:
        """x by this scaling, and x^T by `turned`; in one pass over x where they are the same. As `quantize`."""
        if self != turned:
            return self.quantize(x, largest), turned.quantize(x.t(), largest)
        both = self._quantize(x, largest, transpose=True)
        assert both[1] is not None
        return both[0], both[1]

    def _quantize(self, x: Tensor, largest: Tensor, transpose: bool) -> tuple[Scaled, Scaled | None]:
        scale = fp8_scale(largest, self.dtype, self.power_of_two) if self.block is None else None
        power_of_two = self.power_of_two and self.block is not None
        found = ops.fp8_quantize(
            x, self.dtype, block=self.block, scale=scale, power_of_two=power_of_two, transpose=transpose
        )
        usable = torch.where(largest.isfinite(), 1.0, torch.nan)
        first = Scaled(found.data, found.scale_inv * usable, self.block)
        if found.data_t is None or found.scale_inv_t is None:
            return first, None
        return first, Scaled(found.data_t, found.scale_inv_t.contiguous() * usable, self.block)


@dataclass(frozen=True)
class Operands:
    """Of one product a b^T."""

    a: Scaling
    b: Scaling


@dataclass(frozen=True)
class Recipe:
    """The three products; None: in the operands' own dtype."""

    name: str
    forward: Operands
    input_gradient: Operands
    weight_gradient: Operands | None


_TENSOR = Scaling(None, power_of_two=False)
_GRADIENT = Scaling(None, E5M2, power_of_two=False)
_ROW, _LINE, _SQUARE, _MICRO = (Scaling(block) for block in (WHOLE_ROW, (1, TILE), (TILE, TILE), MICROSCALED))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("tensorwise", Operands(_TENSOR, _TENSOR), Operands(_GRADIENT, _TENSOR), Operands(_GRADIENT, _TENSOR)),
        Recipe("rowwise", Operands(_ROW, _ROW), Operands(_ROW, _ROW), Operands(_ROW, _ROW)),
        Recipe("rowwise_wide", Operands(_ROW, _ROW), Operands(_ROW, _ROW), None),
        Recipe("blockwise", Operands(_LINE, _SQUARE), Operands(_LINE, _SQUARE), Operands(_LINE, _LINE)),
        Recipe("mxfp8", Operands(_MICRO, _MICRO), Operands(_MICRO, _MICRO), Operands(_MICRO, _MICRO)),
    )
}
"""By the word of `precision.fp8.recipe`."""

WITHOUT_TENSOR_SCALES = {"tensorwise": Recipe("tensorwise", Operands(_ROW, _ROW), Operands(_ROW, _ROW), None)}
"""What takes the place of a recipe where no operand is one tensor."""
