"""The flat AdamW update and the clipping factor against torch's."""

import pytest
import torch

from megalm.ops import adamw_, l2_norm_nonfinite
from megalm.optim.clip import clip_factor


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.25, dtype=torch.float64)])
def test_five_updates_equal_torch(scale):
    torch.manual_seed(0)
    weights = torch.randn(1003)
    reference = weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([reference], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    first, second = torch.zeros(1003), torch.zeros(1003)
    rounded = torch.empty(1003, dtype=torch.bfloat16)
    for step in range(1, 6):
        grad = torch.randn(1003)
        reference.grad = grad * float(scale)
        optimizer.step()
        settings = dict(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2, step=step)
        adamw_(weights, grad.clone(), first, second, **settings, grad_scale=scale, out=rounded)
    torch.testing.assert_close(weights, reference.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded, weights.to(torch.bfloat16))
    torch.testing.assert_close(first, optimizer.state[reference]["exp_avg"], rtol=1e-5, atol=1e-7)


def test_squares_and_nonfinite():
    parts = [torch.randn(100_003), torch.randn(7) * 1e3, torch.zeros(0)]
    squares, bad = l2_norm_nonfinite(parts, torch.device("cpu"))
    assert bad == 0
    assert squares.item() == pytest.approx(sum(float((p.double() ** 2).sum()) for p in parts), rel=1e-6)
    parts[0][5], parts[0][9], parts[1][0] = float("nan"), float("inf"), float("-inf")
    squares, bad = l2_norm_nonfinite(parts, torch.device("cpu"))
    assert bad == 3 and not torch.isfinite(squares)


def test_clip_factor():
    norm = torch.tensor(4.0, dtype=torch.float64)
    assert clip_factor(norm, 1.0).item() == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(norm, 8.0) == 1.0 and clip_factor(norm, 0.0) == 1.0
    assert clip_factor(torch.tensor(0.0), 1.0) == 1.0
