"""Where the weight gradient of a linear layer goes: to autograd, into the optimizer's buffer, or onto a queue for
later.

A parameter may have a *sink* (`parameter.gradient_sink`; the sharded optimizer gives one): dW is then accumulated by
the matrix product itself into an fp32 buffer. Inside `deferred.deferring(queue)` the product waits until `queue.run()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megalm.parallel import deferred
from megalm.precision.product import Backward


class GradientSink(Protocol):
    """Takes gradients of one parameter straight into a buffer."""

    @property
    def active(self) -> bool:
        """Whether gradients are being collected now; if not, they go to `.grad` as usual."""

    def open(self) -> tuple[Tensor, bool]:
        """Open the fp32 buffer, shaped as the parameter, and whether it is empty (to be overwritten instead of added to)."""

    def close(self) -> None:
        """The gradient is in the buffer."""


def deliver_weight_gradient(weight: Tensor, products: Backward, x: Tensor | None) -> Tensor | None:
    """dW = dy^T x for autograd, or None when it was put off or went to a sink.

    x: None where the products have it. Shapes: weight [F, H], products of dy [N, F], x [N, H]
    """
    return deferred.compute_or_defer(weight, lambda: _compute(weight, products, x))


@torch.no_grad()
def _compute(weight: Tensor, products: Backward, x: Tensor | None) -> Tensor | None:
    sink: GradientSink | None = getattr(weight, "gradient_sink", None)
    if sink is None or not sink.active:
        return products.compute_weight_gradient(x)
    buffer, empty = sink.open()
    products.add_weight_gradient(buffer, x, empty=empty)
    sink.close()
    return None


def deliver_ready_gradient(weight: Tensor, gradient: Tensor, factor: Tensor) -> Tensor | None:
    """A gradient that is there already up to a factor, for autograd, or None when it was put off or went to a sink.

    Shapes: weight [F, H], gradient fp32 [F, H], which is used up; factor scalar
    """
    return deferred.compute_or_defer(weight, lambda: _scaled(weight, gradient, factor))


@torch.no_grad()
def _scaled(weight: Tensor, gradient: Tensor, factor: Tensor) -> Tensor | None:
    sink: GradientSink | None = getattr(weight, "gradient_sink", None)
    if sink is None or not sink.active:
        return gradient.mul_(factor).to(weight.dtype)
    buffer, empty = sink.open()
    if empty:
        torch.mul(gradient, factor, out=buffer)
    else:
        buffer.addcmul_(gradient, factor)
    sink.close()
    return None


class GradientRoom:
    """Where a gradient that comes in parts is added up: the parameter's sink, or a tensor for autograd.

    add(buffer, empty) is called for each part; `finish` gives what the backward of an autograd function returns.
    """

    def __init__(self, weight: Tensor) -> None:
        sink: GradientSink | None = getattr(weight, "gradient_sink", None)
        self._sink = sink if sink is not None and sink.active else None
        if self._sink is None:
            self._buffer, self._empty = torch.empty_like(weight), True
        else:
            self._buffer, self._empty = self._sink.open()

    def add(self, write: Callable[[Tensor, bool], None]) -> None:
        """write(buffer, empty) adds a part; where the buffer is empty it overwrites all of it."""
        write(self._buffer, self._empty)
        self._empty = False

    def finish(self) -> Tensor | None:
        """The sum, or None where the sink has it. Without any part it is zero."""
        if self._empty:
            self._buffer.zero_()
        if self._sink is None:
            return self._buffer
        self._sink.close()
        return None
