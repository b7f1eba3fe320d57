import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.adamw import adamw_reference_

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def state(size, device):
    return [torch.randn(size, device=device), torch.randn(size, device=device), *torch.rand(2, size, device=device)]


@pytest.mark.parametrize("size", [1, 7, 1023, 4099])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", ["number", "tensor"])
def test_three_steps(kernels, size, out_dtype, scale):
    got = state(size, kernels.device)
    truth = [t.double() for t in got]
    out = None if out_dtype is None else torch.full((size,), torch.nan, dtype=out_dtype, device=kernels.device)
    grad_scale = 0.5 if scale == "number" else torch.tensor(0.5, device=kernels.device)
    for step in (1, 2, 3):
        gradient = got[1].clone()
        ops.adamw_(*got, **OPTIONS, step=step, grad_scale=grad_scale, out=out)
        adamw_reference_(*truth, **OPTIONS, step=step, grad_scale=0.5)
        assert torch.equal(got[1], gradient)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    if out is not None:
        assert torch.equal(out, got[0].to(out_dtype))


def test_agrees_with_torch(kernels):
    weight = torch.randn(50, device=kernels.device)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = torch.zeros(2, 50, device=kernels.device)
    for step in (1, 2):
        parameter.grad = torch.randn(50, device=kernels.device)
        ops.adamw_(weight, parameter.grad.clone(), moments[0], moments[1], **OPTIONS, step=step)
        optimizer.step()
    torch.testing.assert_close(weight, parameter.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_skip_flag(kernels, native):
    update = ops.adamw_ if native else adamw_reference_
    tensors = state(20, kernels.device)
    before = [t.clone() for t in tensors]
    out = torch.zeros(20, dtype=torch.bfloat16, device=kernels.device)
    update(*tensors, **OPTIONS, step=1, skip=torch.ones(1, device=kernels.device), out=out)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)) and not out.any()
    update(*tensors, **OPTIONS, step=1, skip=torch.zeros(1, device=kernels.device), out=out)
    assert not torch.equal(tensors[0], before[0]) and out.any()


def test_bad_arguments_are_named(kernels):
    tensors = state(4, kernels.device)
    with pytest.raises(ConfigError, match="exp_avg has another shape"):
        ops.adamw_(tensors[0], tensors[1], tensors[2][:3], tensors[3], **OPTIONS, step=1)
    with pytest.raises(ConfigError, match="step=0"):
        ops.adamw_(*tensors, **OPTIONS, step=0)
