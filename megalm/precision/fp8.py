"""The products of a linear layer in 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalm.config.errors import ConfigError
from megalm.config.precision import find_multiple
from megalm.ops.scaled_mm import Scaled, scaled_mm
from megalm.precision.fp8_experts import Fp8Grouped
from megalm.precision.grouped import GroupedProduct
from megalm.precision.meter import Meter
from megalm.precision.product import PLAIN, Backward, Forward, Product, Reduce
from megalm.precision.recipes import Recipe, find_largest


class StoredWeight(NamedTuple):
    """A weight's largest magnitude, W for the forward product, and W^T for the input's gradient where it was made, too."""

    largest: Tensor
    forward: Scaled
    turned: Scaled | None


@dataclass
class KeptWeight:
    """A weight in 8-bit floats through a step, in which it does not change."""

    active: bool = False
    stored: StoredWeight | None = None


@dataclass(frozen=True)
class Fp8Product(Product):
    """Three products by a recipe. What is not 8-bit: the bias, the sums, y, dx and dW.

    Keeps for backward the largest magnitudes of x and W, and where it is `keeping`, x in the form that dW needs. Each operand is
    read once for both of its products where their scales allow that, and weights once a step (`keep_weights`).
    Numbers of rows that devices do not serve are multiplied in the operands' dtype: no batch of training has one
    (`megalm.launch.resolve` sees to it), texts that are written on the way do.
    """

    recipe: Recipe
    meter: Meter
    """Has the product's name, such as layers.0.mlp.up."""
    over_x: tuple[Reduce, ...] = ()
    over_weight: tuple[Reduce, ...] = ()
    over_grad: tuple[Reduce, ...] = ()
    keeps_x: bool = False
    weights: KeptWeight = field(default_factory=KeptWeight)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool = False) -> Forward:
        rows, how, later = x.reshape(-1, x.shape[-1]), self.recipe.forward, self.recipe.weight_gradient
        if self.meter.wide or rows.shape[0] % find_multiple(self.recipe.name):
            return PLAIN.forward(x, weight, bias)
        largest, stored = find_largest(rows, self.over_x), self.quantize_weight(weight)
        kept: tuple[Tensor, ...] = (largest, stored.largest)
        if has_x := keep and self.keeps_x and later is not None:
            a, turned = how.a.quantize_both(rows, later.b, largest)
            kept = (*kept, turned.data, turned.scale_inv)
        else:
            a = how.a.quantize(rows, largest)
        self.meter.see("x", rows, largest, a)
        self.meter.see("weight", weight, stored.largest, stored.forward)
        y = scaled_mm(a, stored.forward, x.dtype, fast=True)
        if bias is not None:
            y += bias
        return Forward(y.view(*x.shape[:-1], weight.shape[0]), kept, has_x)

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> Backward:
        if not kept:
            return PLAIN.backward(grad, kept)
        return _Fp8Backward(self, grad, find_largest(grad, self.over_grad), *kept)

    def quantize_weight(self, weight: Tensor) -> StoredWeight:
        """W for the forward product and, where weights are kept through the step, for the input's gradient."""
        if self.weights.stored is not None:
            return self.weights.stored
        largest = find_largest(weight, self.over_weight)
        forward, backward = self.recipe.forward.b, self.recipe.input_gradient.b
        if not self.weights.active:
            return StoredWeight(largest, forward.quantize(weight, largest), None)
        self.weights.stored = StoredWeight(largest, *forward.quantize_both(weight, backward, largest))
        return self.weights.stored

    def turn_weight(self, weight: Tensor, largest: Tensor) -> Scaled:
        """W^T for the input's gradient; largest: what forward found."""
        stored = self.weights.stored
        if stored is not None and stored.turned is not None:
            return stored.turned
        return self.recipe.input_gradient.b.quantize(weight.t(), largest)

    def keeping(self) -> Product:
        return replace(self, keeps_x=True)

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
    """dy is quantised for both products at once; dW's form may wait for its turn, without dy itself."""

    def __init__(
        self, product: Fp8Product, grad: Tensor, largest: Tensor, largest_x: Tensor, largest_weight: Tensor, *x: Tensor
    ) -> None:
        self.product, self.shape, self.dtype = product, grad.shape, grad.dtype
        self.rows: Tensor | None = grad.reshape(-1, grad.shape[-1])
        self.largest, self.largest_x, self.largest_weight = largest, largest_x, largest_weight
        self.x = x
        """Data and scales of x^T, where forward kept them."""
        self.turned: Scaled | None = None

    def compute_input_gradient(self, weight: Tensor) -> Tensor:
        rows, recipe = self.rows, self.product.recipe
        assert rows is not None
        how, later = recipe.input_gradient.a, recipe.weight_gradient
        if later is None:
            a = how.quantize(rows, self.largest)
        else:
            (a, self.turned), self.rows = how.quantize_both(rows, later.a, self.largest), None
        self.product.meter.see("grad", rows, self.largest, a)
        b = self.product.turn_weight(weight, self.largest_weight)
        return scaled_mm(a, b, self.dtype).view(*self.shape[:-1], weight.shape[1])

    def compute_weight_gradient(self, x: Tensor | None) -> Tensor:
        return self._multiply(x, self.dtype)

    def add_weight_gradient(self, buffer: Tensor, x: Tensor | None, *, empty: bool) -> None:
        product = self._multiply(x, buffer.dtype)  # not rounded before it is added
        if empty:
            buffer.copy_(product)
        else:
            buffer.add_(product)

    def _multiply(self, x: Tensor | None, dtype: torch.dtype) -> Tensor:
        how = self.product.recipe.weight_gradient
        if how is None:
            assert x is not None and self.rows is not None
            return self.rows.t().mm(x)
        if self.turned is None:
            assert self.rows is not None
            self.turned = how.a.quantize(self.rows.t(), self.largest)
        if self.x:
            data, scale_inv = self.x
            return scaled_mm(self.turned, Scaled(data, scale_inv, how.b.block), dtype)
        assert x is not None
        return scaled_mm(self.turned, how.b.quantize(x.t(), self.largest_x), dtype)


def list_8_bit_products(modules: Iterable[nn.Module]) -> Iterator[Fp8Product | Fp8Grouped]:
    """Yield those inside the modules."""
    for module in modules:
        for inner in module.modules():
            products = [getattr(inner, "product", None), *getattr(inner, "products", ())]
            yield from (each for each in products if isinstance(each, Fp8Product | Fp8Grouped))


def find_meters(modules: Iterable[nn.Module]) -> list[Meter]:
    """Find those of all 8-bit products inside the modules."""
    return [product.meter for product in list_8_bit_products(modules)]


def find_kept_weights(modules: Iterable[nn.Module]) -> list[KeptWeight]:
    """Find where the linear layers inside the modules keep their weights through a step."""
    return [product.weights for product in list_8_bit_products(modules) if isinstance(product, Fp8Product)]


@contextmanager
def keep_weights(kept: Sequence[KeptWeight]) -> Iterator[None]:
    """Inside the block weights do not change: each is quantised once."""
    for each in kept:
        each.active, each.stored = True, None
    try:
        yield
    finally:
        for each in kept:
            each.active, each.stored = False, None
