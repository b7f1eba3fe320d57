"""How far 8-bit products are from wide ones of the same operands: measured while a model computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megalm.precision.fp8 import Fp8Product
from megalm.precision.fp8_experts import Fp8Grouped
from megalm.precision.grouped import PLAIN_GROUPED, GroupedProduct
from megalm.precision.product import PLAIN, Backward, Forward, Product, Reduce


@dataclass
class Errors:
    """Of one product: norm of the difference over the norm, for y, dx and dW; and the worst row's of y."""

    name: str
    wide: bool
    """It is computed in its operands' dtype after all."""
    found: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, got: Tensor, want: Tensor) -> None:
        """Take in one product; of several (micro-batches) the largest error counts."""
        difference, whole = (got.float() - want.float()), want.float()
        self._keep(part, difference.norm() / whole.norm())
        if part == "y":
            rows = difference.reshape(-1, got.shape[-1]).norm(dim=1) / whole.reshape(-1, got.shape[-1]).norm(dim=1)
            self._keep("worst row", rows.nan_to_num().max() if rows.numel() else rows.sum())

    def _keep(self, part: str, error: Tensor) -> None:
        self.found[part] = max(self.found.get(part, 0.0), float(error))


@dataclass(frozen=True)
class ComparedProduct(Product):
    """An 8-bit product that tells how far it is from the wide one."""

    inner: Fp8Product
    errors: Errors

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool = False) -> Forward:
        # keep: not asked for of the inner product, since the wide one needs x
        found = self.inner.forward(x, weight, bias)
        self.errors.add("y", found.y, PLAIN.forward(x, weight, bias).y)
        return found

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> Backward:
        return _ComparedBackward(self.inner.backward(grad, kept), PLAIN.backward(grad, ()), self.errors)

    def across(self, *, x: Reduce | None = None, weight: Reduce | None = None, grad: Reduce | None = None) -> Product:
        raise NotImplementedError("a model is compared on one rank, after it was built")

    def for_experts(self) -> GroupedProduct:
        return self.inner.for_experts()

    def check(self, rows: int, columns: int) -> None:
        self.inner.check(rows, columns)


class _ComparedBackward(Backward):
    def __init__(self, inner: Backward, plain: Backward, errors: Errors) -> None:
        self.inner, self.plain, self.errors = inner, plain, errors

    def compute_input_gradient(self, weight: Tensor) -> Tensor:
        found = self.inner.compute_input_gradient(weight)
        self.errors.add("dx", found, self.plain.compute_input_gradient(weight))
        return found

    def compute_weight_gradient(self, x: Tensor | None) -> Tensor:
        found = self.inner.compute_weight_gradient(x)
        self.errors.add("dW", found, self.plain.compute_weight_gradient(x))
        return found


@dataclass(frozen=True)
class ComparedGrouped(GroupedProduct):
    """The same of experts' products."""

    inner: Fp8Grouped
    errors: Errors

    def multiply(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        found = self.inner.multiply(x, weight, counts)
        self.errors.add("y", found, PLAIN_GROUPED.multiply(x, weight, counts))
        return found

    def multiply_gradient(self, grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        found = self.inner.multiply_gradient(grad, weight, counts)
        self.errors.add("dx", found, PLAIN_GROUPED.multiply_gradient(grad, weight, counts))
        return found

    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, counts: Tensor, *, empty: bool) -> None:
        parts = [torch.empty_like(buffer) for _ in range(2)]
        for product, part in zip((self.inner, PLAIN_GROUPED), parts, strict=True):
            product.add_weight_gradient(part, grad, x, counts, empty=True)
        self.errors.add("dW", *parts)
        self.inner.add_weight_gradient(buffer, grad, x, counts, empty=empty)

    def check(self, rows: int, columns: int) -> None:
        self.inner.check(rows, columns)


def compare_products(modules: Iterable[nn.Module]) -> list[Errors]:
    """From now on the modules' 8-bit products tell their errors, in the list that this gives; for a look, not for training."""
    found: list[Errors] = []

    def compare(product: object) -> object:
        if isinstance(product, Fp8Product | Fp8Grouped):
            found.append(Errors(product.meter.name, product.meter.wide))
            kind = ComparedProduct if isinstance(product, Fp8Product) else ComparedGrouped
            return kind(product, found[-1])  # type: ignore[arg-type]
        return product

    for module in modules:
        for inner in module.modules():
            if isinstance(getattr(inner, "product", None), Product):
                inner.product = compare(inner.product)  # type: ignore[assignment]
            if products := getattr(inner, "products", None):
                inner.products = tuple(map(compare, products))  # type: ignore[assignment]
    return found
