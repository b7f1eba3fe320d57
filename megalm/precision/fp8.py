"""The products of a linear layer in 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megalm.config.errors import ConfigError
from megalm.config.precision import find_multiple
from megalm.ops.scaled_mm import scaled_mm
from megalm.precision.fp8_experts import Fp8Grouped
from megalm.precision.grouped import GroupedProduct
from megalm.precision.meter import Meter
from megalm.precision.product import PLAIN, Backward, Forward, Product, Reduce
from megalm.precision.recipes import Recipe, find_largest


@dataclass(frozen=True)
class Fp8Product(Product):
    """Three products by a recipe. What is not 8-bit: the bias, the sums, y, dx and dW.

    Keeps the largest magnitudes of x and W for backward, where both are quantised again, along the other dimension.
    """

    recipe: Recipe
    meter: Meter
    """Has the product's name, such as layers.0.mlp.up."""
    over_x: tuple[Reduce, ...] = ()
    over_weight: tuple[Reduce, ...] = ()
    over_grad: tuple[Reduce, ...] = ()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Forward:
        if self.meter.wide:
            return PLAIN.forward(x, weight, bias)
        rows, how = x.reshape(-1, x.shape[-1]), self.recipe.forward
        kept = find_largest(rows, self.over_x), find_largest(weight, self.over_weight)
        a, b = how.a.quantize(rows, kept[0]), how.b.quantize(weight, kept[1])
        self.meter.see("x", rows, kept[0], a)
        self.meter.see("weight", weight, kept[1], b)
        y = scaled_mm(a, b, x.dtype, fast=True)
        if bias is not None:
            y += bias
        return Forward(y.view(*x.shape[:-1], weight.shape[0]), kept)

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> Backward:
        if not kept:
            return PLAIN.backward(grad, kept)
        return _Fp8Backward(self, grad, find_largest(grad, self.over_grad), *kept)

    def across(self, *, x: Reduce | None = None, weight: Reduce | None = None, grad: Reduce | None = None) -> Product:
        return replace(
            self,
            over_x=self.over_x + (() if x is None else (x,)),
            over_weight=self.over_weight + (() if weight is None else (weight,)),
            over_grad=self.over_grad + (() if grad is None else (grad,)),
        )

    def for_experts(self) -> GroupedProduct:
        return Fp8Grouped.of(self.recipe, self.meter)

    def check(self, rows: int, columns: int) -> None:
        multiple = find_multiple(self.recipe.name)
        if rows % multiple or columns % multiple:
            raise ConfigError(
                f"{self.meter.name}: a rank's part of the weight is {rows} x {columns}, and precision.fp8.recipe="
                f"{self.recipe.name} multiplies matrices whose sizes are multiples of {multiple}. Leave it in "
                f"precision.dtype (precision.fp8.skip=[{self.meter.name}], or a pattern), or choose other sizes or another "
                "parallel.tensor."
            )


class _Fp8Backward(Backward):
    def __init__(
        self, product: Fp8Product, grad: Tensor, largest: Tensor, largest_x: Tensor, largest_weight: Tensor
    ) -> None:
        self.recipe, self.meter, self.shape = product.recipe, product.meter, grad.shape
        self.rows = grad.reshape(-1, grad.shape[-1])
        self.largest, self.largest_x, self.largest_weight = largest, largest_x, largest_weight

    def compute_input_gradient(self, weight: Tensor) -> Tensor:
        how = self.recipe.input_gradient
        a, b = how.a.quantize(self.rows, self.largest), how.b.quantize(weight.t(), self.largest_weight)
        self.meter.see("grad", self.rows, self.largest, a)
        return scaled_mm(a, b, self.rows.dtype).view(*self.shape[:-1], weight.shape[1])

    def compute_weight_gradient(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.dtype)

    def add_weight_gradient(self, buffer: Tensor, x: Tensor, *, empty: bool) -> None:
        product = self._multiply(x, buffer.dtype)  # not rounded before it is added
        if empty:
            buffer.copy_(product)
        else:
            buffer.add_(product)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        how = self.recipe.weight_gradient
        if how is None:
            return self.rows.t().mm(x)
        a, b = how.a.quantize(self.rows.t(), self.largest), how.b.quantize(x.t(), self.largest_x)
        return scaled_mm(a, b, dtype)


def find_meters(modules: Iterable[nn.Module]) -> list[Meter]:
    """Those of all 8-bit products inside the modules."""
    found = []
    for module in modules:
        for inner in module.modules():
            products = [getattr(inner, "product", None), *getattr(inner, "products", ())]
            found += [each.meter for each in products if isinstance(each, Fp8Product | Fp8Grouped)]
    return found
