"""How a product with a weight matrix is computed: y = x W^T + b forward, dx = dy W and dW = dy^T x backward.

A linear layer is handed one of these by the precision policy, by the name of its weight. Communication is the layer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


class Product(ABC):
    """The three products of a linear layer."""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b. Shapes: x [.., H], weight [F, H], bias [F] -> [.., F]"""

    @abstractmethod
    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """dy W. Shapes: grad [.., F], weight [F, H] -> [.., H]"""

    @abstractmethod
    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """dy^T x, in the operands' dtype. Shapes: grad [N, F], x [N, H] -> [F, H]"""

    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, *, empty: bool) -> None:
        """Add dy^T x to an fp32 buffer; where it is `empty`, overwrite it. Shapes: buffer [F, H]"""
        product = self.weight_gradient(grad, x)
        if empty:
            buffer.copy_(product)
        else:
            buffer.add_(product)


class Plain(Product):
    """Products in the operands' own dtype."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad.matmul(weight)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad.t().mm(x)

    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, *, empty: bool) -> None:
        if buffer.dtype != grad.dtype:
            super().add_weight_gradient(buffer, grad, x, empty=empty)
        elif empty:
            torch.mm(grad.t(), x, out=buffer)
        else:
            buffer.addmm_(grad.t(), x)


PLAIN = Plain()
