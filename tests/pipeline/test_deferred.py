"""Weight gradients put off: the same values, the same hooks, also under recomputation and into a sink."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalm.parallel import deferred
from megalm.parallel.linear import column_parallel
from megalm.parallel.mesh import Axis

ALONE = Axis("tensor")


class Sink:
    """As the sharded optimizer's: gradients go straight into a buffer."""

    active = True

    def __init__(self, parameter: torch.Tensor) -> None:
        self.buffer = torch.zeros_like(parameter)
        self.empty = True
        self.closed = 0

    def open(self):
        empty, self.empty = self.empty, False
        return self.buffer, empty

    def close(self) -> None:
        self.closed += 1


def make():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 5)) for _ in range(2)]
    bias = nn.Parameter(torch.randn(5))
    x = torch.randn(3, 2, 5, requires_grad=True)

    def compute(x):
        hidden = torch.tanh(column_parallel(x, weights[0], bias, ALONE, False))
        hidden = torch.tanh(column_parallel(hidden, weights[1], None, ALONE, False))
        return column_parallel(hidden, weights[0], None, ALONE, False)  # a weight used twice

    return weights, bias, x, compute


def gradients(recompute: bool, defer: bool, sinks: bool):
    weights, bias, x, compute = make()
    calls = []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda p: calls.append(p) if p.grad is not None else None)
        if sinks:
            weight.gradient_sink = Sink(weight)
    y = checkpoint(compute, x, use_reentrant=False) if recompute else compute(x)
    queue = deferred.Queue()
    root = torch.autograd.graph.get_gradient_edge(y.square().sum())
    del y
    if defer:
        with deferred.defer_weight_gradients(queue):
            torch.autograd.backward([root])
        assert len(queue) == 3
        assert all(w.grad is None for w in weights) and not calls
        if sinks:
            assert all(w.gradient_sink.closed == 0 for w in weights)
    else:
        torch.autograd.backward([root])
    assert bias.grad is not None and x.grad is not None
    del root  # nothing of the graph is left when the weights' turn comes
    queue.run()
    assert len(queue) == 0
    if sinks:
        assert [w.gradient_sink.closed for w in weights] == [2, 1] and not calls
        found = [w.gradient_sink.buffer for w in weights]
    else:
        assert sorted(map(id, calls)) == sorted(map(id, weights)), "each hook is called once"
        found = [w.grad for w in weights]
    return [*found, bias.grad, x.grad]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_put_off_is_the_same(recompute, sinks):
    expected = gradients(False, False, False)
    for defer in (False, True):
        torch.testing.assert_close(gradients(recompute, defer, sinks), expected)


def test_only_leaves_that_want_gradients_are_put_off():
    queue = deferred.Queue()
    leaf, frozen = nn.Parameter(torch.ones(2)), torch.ones(2)
    with deferred.defer_weight_gradients(queue):
        assert deferred.compute_or_defer(leaf, lambda: leaf.detach()) is None
        assert deferred.compute_or_defer(frozen, lambda: frozen) is frozen
        assert deferred.compute_or_defer(leaf * 1, lambda: frozen) is frozen
    assert len(queue) == 1
    assert deferred.compute_or_defer(leaf, lambda: frozen) is frozen and len(queue) == 1


def test_each_product_is_freed_as_soon_as_it_is_computed():
    import weakref

    queue = deferred.Queue()
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    held = [torch.ones(3) * i for i in range(3)]
    alive = [weakref.ref(t) for t in held]
    order = []

    def product(index, tensor):
        order.append(sum(ref() is not None for ref in alive))
        return tensor.clone()

    while held:
        tensor = held.pop(0)
        index = 3 - len(held) - 1
        queue.put(parameters[index], lambda index=index, tensor=tensor: product(index, tensor))
    del tensor
    queue.run()
    assert order == [3, 2, 1]
    assert [float(p.grad[0]) for p in parameters] == [0.0, 1.0, 2.0]
