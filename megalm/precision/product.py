"""How a product with a weight matrix is computed: y = x W^T + b forward, dx = dy W and dW = dy^T x backward.

A linear layer is handed one of these by the precision policy, by the name of its weight. Communication is the layer's; where
a product needs a number of the whole operand, of which each rank has a part, the layer says how it is found (`across`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.precision.grouped import PLAIN_GROUPED, GroupedProduct

Reduce = Callable[[Tensor], Tensor]
"""Makes each element the largest that any of the ranks has, in place."""


class Forward(NamedTuple):
    """y [.., F], and what backward needs besides W."""

    y: Tensor
    kept: tuple[Tensor, ...]
    has_x: bool = False
    """Backward needs no x: what it needs of it is kept."""


class Backward(ABC):
    """The two products of a gradient dy: made once of dy, so that what is done to it is done once for both."""

    @abstractmethod
    def compute_input_gradient(self, weight: Tensor) -> Tensor:
        """dy W. Shapes: weight [F, H] -> [.., H]"""

    @abstractmethod
    def compute_weight_gradient(self, x: Tensor | None) -> Tensor:
        """dy^T x, in dy's dtype; x: None where `Forward.has_x`. Shapes: x [N, H] -> [F, H]"""

    def add_weight_gradient(self, buffer: Tensor, x: Tensor | None, *, empty: bool) -> None:
        """Add dy^T x to an fp32 buffer; where it is `empty`, overwrite it. Shapes: buffer [F, H]"""
        product = self.compute_weight_gradient(x)
        if empty:
            buffer.copy_(product)
        else:
            buffer.add_(product)


class Product(ABC):
    """The three products of a linear layer."""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool = False) -> Forward:
        """x W^T + b; keep: a product that would keep x in a smaller form may do so.

        Shapes: x [.., H], weight [F, H], bias [F] -> [.., F]
        """

    @abstractmethod
    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> Backward:
        """The products with dy; kept: what `forward` gave. Shapes: grad [.., F]"""

    def across(self, *, x: Reduce | None = None, weight: Reduce | None = None, grad: Reduce | None = None) -> Product:
        """The same product where each rank has a part of these operands only: how the largest over all parts is found."""
        return self

    def keeping(self) -> Product:
        """The same product where nothing else keeps x for backward, so that a smaller form of it saves memory."""
        return self

    @abstractmethod
    def for_experts(self) -> GroupedProduct:
        """The same for the matrices of a mixture's experts."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """ConfigError where weights [rows, columns] cannot take part in it."""


class _PlainBackward(Backward):
    def __init__(self, grad: Tensor) -> None:
        self.grad = grad
        self.rows = grad.reshape(-1, grad.shape[-1])

    def compute_input_gradient(self, weight: Tensor) -> Tensor:
        return self.grad.matmul(weight)

    def compute_weight_gradient(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return self.rows.t().mm(x)

    def add_weight_gradient(self, buffer: Tensor, x: Tensor | None, *, empty: bool) -> None:
        assert x is not None
        if buffer.dtype != self.rows.dtype:
            super().add_weight_gradient(buffer, x, empty=empty)
        elif empty:
            torch.mm(self.rows.t(), x, out=buffer)
        else:
            buffer.addmm_(self.rows.t(), x)


class Plain(Product):
    """Products in the operands' own dtype."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool = False) -> Forward:
        return Forward(F.linear(x, weight, bias), ())

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> Backward:
        return _PlainBackward(grad)

    def for_experts(self) -> GroupedProduct:
        return PLAIN_GROUPED

    def check(self, rows: int, columns: int) -> None:
        """Weights of any size can."""


PLAIN = Plain()
