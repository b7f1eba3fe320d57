"""Holds a kernel to the plain PyTorch op's accuracy: both are compared with float64."""

import torch

from megalm.ops.backend import use_backend


def leaf(shape, dtype, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def values_and_gradients(function, inputs, gradients):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
    return [
        *outputs,
        *torch.autograd.grad(outputs, wanted, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]),
    ]


def wide(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def check_against_reference(function, reference, inputs, gradients):
    """Values and gradients: the kernel's error is at most 1.5 x that of the reference in the same dtype.

    The floor, two roundings of numbers of the inputs' size, is for outputs that the reference happens to hit exactly.
    """
    got = values_and_gradients(function, inputs, gradients)
    with use_backend("reference"):
        plain = values_and_gradients(reference, inputs, gradients)
        truth = values_and_gradients(reference, [wide(i) for i in inputs], gradients)
    assert len(got) == len(plain) == len(truth)
    for number, (a, b, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert a.shape == t.shape and a.dtype == b.dtype, f"output {number}: {a.shape} {a.dtype}, {t.shape} {b.dtype}"
        if not t.numel():
            continue
        assert a.isfinite().all(), f"output {number} has elements that were not written"
        error, allowed = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        floor = 2 * torch.finfo(a.dtype).eps * t.abs().max().clamp(min=1.0)
        assert error <= 1.5 * allowed + floor, f"output {number}: error {error:.3g}, the reference's {allowed:.3g}"
    return got
