"""Products of runs of rows, each run with its own weight: those of the experts of a mixture."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from megalm.ops.grouped_mm import add_weight_gradient, grouped_product


class GroupedProduct(ABC):
    """The three products of the experts' matrices with the rows that came to them.

    Shapes: x [N, H], grad [N, F], weight [E, F, H], counts int64 [E]: so many rows of each expert, one behind the other
    """

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """x W_e^T -> [N, F]"""

    @abstractmethod
    def multiply_gradient(self, grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """dy W_e -> [N, H]"""

    @abstractmethod
    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, counts: Tensor, *, empty: bool) -> None:
        """Add dy^T x of each run to its matrix of the buffer [E, F, H]; where it is `empty`, overwrite it."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """ConfigError where matrices [rows, columns] cannot take part in it."""


class PlainGrouped(GroupedProduct):
    """Products in the operands' own dtype."""

    def multiply(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return grouped_product(x, weight.transpose(1, 2), counts)

    def multiply_gradient(self, grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return grouped_product(grad, weight, counts)

    def add_weight_gradient(self, buffer: Tensor, grad: Tensor, x: Tensor, counts: Tensor, *, empty: bool) -> None:
        add_weight_gradient(buffer, grad, x, counts, empty=empty)

    def check(self, rows: int, columns: int) -> None:
        """Matrices of any size can."""


PLAIN_GROUPED = PlainGrouped()
