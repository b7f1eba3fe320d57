"""No CUDA kernel's result depends on the order in which threads and blocks run: bitwise, in the emulator."""

import pytest
import torch

from megalm import ops
from megalm.ops import backend
from tests.ops.conftest import SANITIZED

pytestmark = pytest.mark.skipif(not SANITIZED, reason="runs in the emulator: tests/csrc/test_sanitized.py")


def norms(x, y, w, b):
    return torch.autograd.grad(sum(t.sum() for t in ops.add_rms_norm(x, y, w, 1e-5)), [x, y, w]) + torch.autograd.grad(
        (ops.add_layer_norm(x, y, w, b, 1e-5)[0] * y).sum(), [x, y, w, b]
    )


def activations(x, y, w, b):
    return torch.autograd.grad((ops.swiglu(x) + ops.bias_gelu(y, w)[:, : x.shape[1] // 2]).square().sum(), [x, y, w])


def rotations(x, y, w, b):
    x4, y4 = x.view(5, 2, 3, 28), y.view(5, 2, 3, 28)
    angles = torch.arange(5 * 14.0).view(5, 1, 1, 14)
    turned = ops.rotary(x4, angles.cos(), angles.sin()) * ops.rotary(y4, angles.cos(), angles.sin(), interleaved=True)
    return torch.autograd.grad(turned.square().sum(), [x, y])


def losses(x, y, w, b):
    labels = torch.arange(10) * 8
    loss = ops.cross_entropy(x, labels, z_loss=1e-2, label_smoothing=0.1)
    return (loss, *torch.autograd.grad(loss.sum(), [x]))


def dropped(x, y, w, b):
    return torch.autograd.grad(ops.bias_dropout_add(x, y, w, p=0.5, seed=5).square().sum(), [x, y, w])


def weighed(x, y, w, b):
    scores, flow = x.view(1, 2, 5, 84), y.view(1, 2, 5, 84)
    starts = ops.find_document_starts(torch.arange(84).view(1, 84) // 40)
    return torch.autograd.grad((ops.causal_softmax(scores, slopes=w[:2].detach(), starts=starts) * flow).sum(), [x])


def clipped(x, y, w, b):
    w, m, v = x.detach().flatten().clone(), torch.zeros(840), x.detach().flatten().square()
    g, lengths = y.detach().flatten(), [3, 400, 437]
    options = {"beta2": 0.95, "eps": 1e-8, "step": 2}
    squares = ops.update_squares(g, v, lengths, **options)
    counts = torch.tensor(lengths)
    segments = ops.Segments(counts.cumsum(0), ops.update_clipping_rates(squares, counts))
    ops.adamw_(w, g, m, v, lr=0.1, beta1=0.9, weight_decay=0.1, segments=segments, **options)
    return w, m, v, squares


def updates(x, y, w, b):
    w, m, v = x.detach().flatten().clone(), torch.zeros(840), torch.zeros(840)
    g = y.detach().flatten()
    ops.adamw_(w, g, m, v, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1)
    return w, m, v, ops.l2_norm_nonfinite([g, torch.cat([g] * 50)])


@pytest.mark.parametrize("function", [norms, activations, rotations, losses, dropped, weighed, clipped, updates])
def test_bitwise_the_same_in_every_order(kernels, function):
    if kernels.place != "emulated":
        pytest.skip("about the emulator")
    library = backend.get_library()
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((10, 84), (10, 84), (84,), (84,))]
    results, launches = [], library.emulator_launches()
    for order in (0, 1, 5):
        library.set_emulator_order(order)
        results.append(function(*inputs))
    assert library.emulator_launches() >= launches + 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
