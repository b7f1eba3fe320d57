"""The products of a mixture's experts in 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.config.precision import find_multiple
from megalm.ops.grouped_mm import add_weight_gradient, grouped_product, list_spans
from megalm.precision.grouped import PLAIN_GROUPED, GroupedProduct
from megalm.precision.meter import Meter
from megalm.precision.recipes import WITHOUT_TENSOR_SCALES, Recipe, Scaling, find_largest


@dataclass(frozen=True)
class Fp8Grouped(GroupedProduct):
    """The products of a recipe, each expert's operands by themselves.

    An expert's rows come from the micro-batches of all ranks that share experts, so a scale over all of them would be another
    on another layout: with tensor scales the rows and the weights' rows have scales of their own here, and the weights'
    gradients, whose sum runs over the rows, stay in the operands' dtype.

    What the 8-bit floats stand for is multiplied: in the operands' dtype where that holds it (bf16 does: scales are powers
    of two), in fp32 on a CPU.
    """

    recipe: Recipe
    meter: Meter
    """Has the product's name, such as layers.0.mlp.experts.up."""

    @staticmethod
    def of(recipe: Recipe, meter: Meter) -> Fp8Grouped:
        """With scales that no other rank's rows decide."""
        return Fp8Grouped(WITHOUT_TENSOR_SCALES.get(recipe.name, recipe), meter)

    def multiply(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if self.meter.wide:
            return PLAIN_GROUPED.multiply(x, weight, counts)
        how = self.recipe.forward
        a, b = self._pass(how.a, x, "x"), self._pass_all(how.b, weight, "weight")
        return grouped_product(a, b.transpose(1, 2), counts).to(x.dtype)

    def multiply_gradient(self, grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if self.meter.wide:
            return PLAIN_GROUPED.multiply_gradient(grad, weight, counts)
        how = self.recipe.input_gradient
        turned = self._pass_all(how.b, weight.transpose(1, 2).contiguous())
        return grouped_product(self._pass(how.a, grad, "grad"), turned.transpose(1, 2), counts).to(grad.dtype)

    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, counts: Tensor, *, empty: bool) -> None:
        how = self.recipe.weight_gradient
        if how is None or self.meter.wide or buffer.is_meta:
            return PLAIN_GROUPED.add_weight_gradient(buffer, grad, x, counts, empty=empty)
        rows, columns = torch.zeros_like(grad, dtype=_wide(grad)), torch.zeros_like(x, dtype=_wide(x))
        for start, end in list_spans(counts):
            if end > start:
                rows[start:end] = self._pass(how.a, grad[start:end].t()).t()
                columns[start:end] = self._pass(how.b, x[start:end].t()).t()
        add_weight_gradient(buffer, rows, columns, counts, empty=empty)

    def check(self, rows: int, columns: int) -> None:
        multiple = find_multiple(self.recipe.name)
        if rows % multiple or columns % multiple:
            raise ConfigError(
                f"{self.meter.name}: a rank's part of an expert's matrix is {rows} x {columns}, and precision.fp8.recipe="
                f"{self.recipe.name} multiplies matrices whose sizes are multiples of {multiple}. Leave it in "
                f"precision.dtype (precision.fp8.skip=[{self.meter.name}], or a pattern), or choose other sizes."
            )

    def _pass(self, how: Scaling, x: Tensor, operand: str | None = None) -> Tensor:
        """What a matrix stands for after it has become 8-bit floats; operand: what it is entered as in the meter."""
        if x.is_meta:
            return x.to(_wide(x))
        largest = find_largest(x)
        scaled = how.quantize(x, largest)
        if operand is not None:
            self.meter.see(operand, x, largest, scaled)
        return scaled.dequantize(_wide(x))

    def _pass_all(self, how: Scaling, matrices: Tensor, operand: str | None = None) -> Tensor:
        """The same of several matrices. Shapes: [E, A, B] -> the same"""
        experts, rows, columns = matrices.shape
        if how.block is not None and rows % how.block[0] == 0:  # no block lies in two of them
            whole = self._pass(how, matrices.reshape(experts * rows, columns), operand)
            return whole.view(experts, rows, columns)
        return torch.stack([self._pass(how, matrix, operand) for matrix in matrices])


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_cuda else torch.float32
