"""The ops whose reference is no plain function of the same dtype: error against float64 at most 1.5 times PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from megalm import ops
from megalm.ops.adamw import adamw_reference_
from tests.ops.accuracy import leaf


def check(got, plain, truth):
    """The floor: two roundings of a number of the result's size, where PyTorch happens to hit it."""
    error, allowed = ((t.double() - truth).abs().max() for t in (got, plain))
    floor = 2 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=1.0)
    assert error <= 1.5 * allowed + floor, f"error {error:.3g}, PyTorch's {allowed:.3g}"


@pytest.mark.parametrize("shape", [(5, 33), (4, 3000)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(kernels, dtype, shape, smoothing):
    logits, labels = leaf(shape, dtype, kernels.device, scale=6.0), torch.randint(0, shape[1], shape[:1])
    labels, flow = labels.to(kernels.device), torch.rand(shape[0], device=kernels.device)
    options = {"reduction": "none", "label_smoothing": smoothing}
    results = []
    for values in (logits, logits.detach().double().requires_grad_()):
        loss = F.cross_entropy(values, labels, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, [values], flow.to(loss.dtype))))
    loss = ops.cross_entropy(logits, labels, label_smoothing=smoothing)
    got = (loss.detach(), *torch.autograd.grad(loss, [logits], flow))
    for a, b, t in zip(got, *results, strict=True):
        check(a, b, t)


@pytest.mark.parametrize("size", [7, 4099])
def test_adamw(kernels, size):
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 4}
    start = [*torch.randn(2, size, device=kernels.device), *torch.rand(2, size, device=kernels.device)]
    got, plain, truth = ([t.clone() for t in start], [t.clone() for t in start], [t.double() for t in start])
    ops.adamw_(*got, **options)
    adamw_reference_(*plain, **options)
    adamw_reference_(*truth, **options)
    for a, b, t in zip(got, plain, truth, strict=True):
        check(a, b, t)


def test_update_squares(kernels):
    grad, average = torch.randn(5000, device=kernels.device), torch.rand(5000, device=kernels.device)
    lengths, results = [1, 2999, 2000], []
    for g, v in ((grad, average), (grad.double(), average.double())):
        ratios = g.square() / ((0.95 * v + 0.05 * g.square()) / (1 - 0.95**3)).clamp(min=1e-16)
        results.append(torch.stack([part.sum() for part in ratios.split(lengths)]))
    got = ops.update_squares(grad, average, lengths, beta2=0.95, eps=1e-8, step=3)
    check(got.float(), *results)


@pytest.mark.parametrize("size", [9, 40001])
def test_sum_of_squares(kernels, dtype, size):
    x = torch.randn(size, device=kernels.device).to(dtype)
    got = ops.l2_norm_nonfinite([x])[0]
    check(got.float().sqrt(), torch.linalg.vector_norm(x), torch.linalg.vector_norm(x.double()))


@pytest.mark.parametrize("shape", [(3, 33), (8, 1000)], ids=str)
def test_sum_parts(kernels, dtype, shape):
    x = torch.randn(shape, device=kernels.device).to(dtype)
    check(ops.sum_parts(x), x.sum(0), x.double().sum(0))
