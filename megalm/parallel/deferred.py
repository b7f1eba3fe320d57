"""Weight gradients put off until later, for pipeline schedules that split backward in two.

A layer whose weight gradient is a matrix product asks `compute_or_defer` for it in its backward pass. Usually that
computes it at once. Inside `defer_weight_gradients(queue)` the product is queued and None is returned: autograd goes on with
the input's gradient only; `queue.run()` later computes the products and accumulates them into the parameters, through
the same AccumulateGrad nodes (and so the same post-accumulate hooks) as backward would have.

A hook on a parameter whose gradient was put off is called during backward, too, with `grad` as it was before (None, if
hooks take the gradient away): such a hook must leave when `grad` is None.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Queue:
    """Weight-gradient products of one backward pass."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, Callable[[], Tensor | None]]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, parameter: Tensor, product: Callable[[], Tensor | None]) -> None:
        """Remember to add product() to the parameter's gradient; it returns None if it has added it by itself."""
        self._entries.append((parameter, product))

    def run(self) -> None:
        """Compute all products. A parameter that was used several times gets their sum, and its hooks one call.

        A product that returns None has put the gradient where it belongs by itself.
        """
        entries, self._entries = self._entries, []
        remaining: dict[int, int] = {}
        for parameter, _ in entries:
            remaining[id(parameter)] = remaining.get(id(parameter), 0) + 1
        sums: dict[int, Tensor] = {}
        entries.reverse()
        while entries:  # popped, so that what each product holds is freed as soon as it is computed
            parameter, product = entries.pop()
            key = id(parameter)
            with torch.no_grad():
                gradient = product()
                del product
                if gradient is not None:
                    sums[key] = sums[key] + gradient if key in sums else gradient
            remaining[key] -= 1
            if not remaining[key] and key in sums:
                torch.autograd.backward([parameter], [sums.pop(key)])


# A plain module variable, not a context variable: on GPUs autograd runs backward on threads of its own, which would not
# see the latter. One backward pass runs at a time in a process.
_active: list[Queue] = []


@contextmanager
def defer_weight_gradients(queue: Queue) -> Iterator[None]:
    """Weight gradients of backward passes inside this block go to `queue`."""
    _active.append(queue)
    try:
        yield
    finally:
        _active.pop()


def compute_or_defer(parameter: Tensor, product: Callable[[], Tensor | None]) -> Tensor | None:
    """product(), or None where it is put off. For the backward of an autograd function.

    `parameter` is the leaf whose gradient it is; anything else (a view, a cast copy) is never put off.
    """
    if _active and parameter.is_leaf and parameter.requires_grad:
        _active[-1].put(parameter, product)
        return None
    return product()
