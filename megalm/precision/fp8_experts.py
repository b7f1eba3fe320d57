"""The products of a mixture's experts in 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.config.precision import find_multiple
from megalm.ops.grouped_mm import add_weight_gradient, grouped_product, list_spans
from megalm.precision.grouped import GroupedProduct
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
    name: str

    @staticmethod
    def of(recipe: Recipe, name: str) -> Fp8Grouped:
        """With scales that no other rank's rows decide."""
        return Fp8Grouped(WITHOUT_TENSOR_SCALES.get(recipe.name, recipe), name)

    def multiply(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        how = self.recipe.forward
        return grouped_product(_pass(how.a, x), _pass_all(how.b, weight).transpose(1, 2), counts).to(x.dtype)

    def multiply_gradient(self, grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        how = self.recipe.input_gradient
        turned = _pass_all(how.b, weight.transpose(1, 2).contiguous())
        return grouped_product(_pass(how.a, grad), turned.transpose(1, 2), counts).to(grad.dtype)

    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, counts: Tensor, *, empty: bool) -> None:
        how = self.recipe.weight_gradient
        if how is None or buffer.is_meta:
            return add_weight_gradient(buffer, grad, x, counts, empty=empty)
        rows, columns = torch.zeros_like(grad, dtype=_wide(grad)), torch.zeros_like(x, dtype=_wide(x))
        for start, end in list_spans(counts):
            if end > start:
                rows[start:end] = _pass(how.a, grad[start:end].t()).t()
                columns[start:end] = _pass(how.b, x[start:end].t()).t()
        add_weight_gradient(buffer, rows, columns, counts, empty=empty)

    def check(self, rows: int, columns: int) -> None:
        multiple = find_multiple(self.recipe.name)
        if rows % multiple or columns % multiple:
            raise ConfigError(
                f"{self.name}: a rank's part of an expert's matrix is {rows} x {columns}, and precision.fp8.recipe="
                f"{self.recipe.name} multiplies matrices whose sizes are multiples of {multiple}. Leave it in "
                f"precision.dtype (precision.fp8.skip=[{self.name}], or a pattern), or choose other sizes."
            )


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_cuda else torch.float32


def _pass(how: Scaling, x: Tensor) -> Tensor:
    """What a matrix stands for after it has become 8-bit floats."""
    return x.to(_wide(x)) if x.is_meta else how.quantize(x, find_largest(x)).dequantize(_wide(x))


def _pass_all(how: Scaling, matrices: Tensor) -> Tensor:
    """The same of several matrices. Shapes: [E, A, B] -> the same"""
    experts, rows, columns = matrices.shape
    if how.block is not None and rows % how.block[0] == 0:  # no block lies in two of them
        return _pass(how, matrices.reshape(experts * rows, columns)).view(experts, rows, columns)
    return torch.stack([_pass(how, matrix) for matrix in matrices])
