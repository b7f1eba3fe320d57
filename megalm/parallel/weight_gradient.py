"""Where the weight gradient of a linear layer goes, and when it is computed.

By default a layer's backward returns dW to autograd. Two things change that:

- A parameter may have a *sink* (the sharded optimizer gives one): dW is then accumulated by the matrix product itself
into an fp32 buffer.
- Inside `deferred()` the product is not computed at all but queued, so that a pipeline schedule can send the input
gradient to the
  previous stage first and fill its bubbles with the weight gradients later (zero-bubble pipelines, Qi et al. 2023,
  arXiv:2401.10241).

Only matrices are deferred: the gradients of biases, norms and embeddings cost little and come with the input gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class GradientSink(Protocol):
    """Takes gradients of one parameter straight into a buffer."""

    @property
    def active(self) -> bool:
        """Whether gradients are being collected now; if not, they go to `.grad` as usual."""

    def open(self) -> tuple[Tensor, bool]:
        """The fp32 buffer, shaped as the parameter, and whether it is empty (to be overwritten instead of added to)."""

    def close(self) -> None:
        """The gradient is in the buffer."""


class WeightGradientQueue:
    """Weight-gradient products of one backward pass, waiting to be run."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, weight: Tensor, grad: Tensor, x: Tensor) -> None:
        self._waiting.append((weight, grad, x))

    @torch.no_grad()
    def run(self) -> None:
        """Compute every queued product, in order, and accumulate it: into the parameter's sink, or else into
        `.grad`."""
        waiting, self._waiting = self._waiting, []
        waiting.reverse()
        while waiting:
            weight, grad, x = waiting.pop()
            product = _accumulate(weight, grad, x)
            if product is not None:
                weight.grad = product if weight.grad is None else weight.grad.add_(product)


_ACTIVE: list[WeightGradientQueue] = []


@contextmanager
def deferred() -> Iterator[WeightGradientQueue]:
    """Backward passes inside the block queue their weight-gradient products; run them with `queue.run()` at any later
    time."""
    queue = WeightGradientQueue()
    _ACTIVE.append(queue)
    try:
        yield queue
    finally:
        _ACTIVE.remove(queue)


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """dW = grad^T x for autograd, or None when it went to a queue or a sink.

    Shapes: weight [F, H], grad [N, F], x [N, H]
    """
    if _ACTIVE:
        _ACTIVE[-1].add(weight, grad, x)
        return None
    return _accumulate(weight, grad, x)


def _accumulate(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    sink: GradientSink | None = getattr(weight, "gradient_sink", None)
    if sink is None or not sink.active:
        return grad.t().mm(x)
    buffer, empty = sink.open()
    if buffer.dtype != grad.dtype:
        product = grad.t().mm(x)
        buffer.copy_(product) if empty else buffer.add_(product)
    elif empty:
        torch.mm(grad.t(), x, out=buffer)
    else:
        buffer.addmm_(grad.t(), x)
    sink.close()
    return None
