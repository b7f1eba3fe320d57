"""CPU kernels write large outputs past the cache: each row must be what it is in a small tensor, bit by bit."""

import pytest
import torch

from megalm import ops

ROWS, WIDTH = 2050, 1536  # 12.6 MB in fp32: beyond csrc/common/vec.h's kStreamBytes
PICKED = [0, 1, 1024, 1025, 2049]


def forward_and_backward(function):
    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.full_like(y, 0.5))]

    return run


def spread(x):
    row_map = ops.moe_row_map(torch.arange(len(x)).view(-1, 1) * 7 % 5, 5)
    weights = torch.full((len(x), 1), 0.75, requires_grad=True)
    y = ops.moe_permute(x, row_map)
    y = y + ops.moe_unpermute(y, row_map, weights)[row_map.sources]
    return y[row_map.rows[:, 0]]


# What makes an output of the input's rows; a row depends on itself alone.
FUNCTIONS = {
    "swiglu": forward_and_backward(lambda x, y: ops.swiglu(torch.cat([x, y], 1))),
    "bias_gelu": forward_and_backward(lambda x, y: ops.bias_gelu(x) + y),
    "rms_norm": forward_and_backward(lambda x, y: ops.add_rms_norm(x, y, torch.ones(WIDTH), 1e-5)[0]),
    "layer_norm": forward_and_backward(lambda x, y: ops.layer_norm(x, torch.ones(WIDTH), None, 1e-5) + y),
    "cross_entropy": forward_and_backward(lambda x, y: ops.cross_entropy(x, torch.full((len(x),), 700))[:, None] + y),
    "permute": forward_and_backward(lambda x, y: spread(x) + y),
    "dequantize": lambda x, y: [
        ops.fp8_dequantize(q.data, q.scale_inv, block=(1, 128))
        for q in (ops.fp8_quantize(torch.cat([x, y], 1), block=(1, 128)),)
    ],
    "sum_parts": lambda x, y: [ops.sum_parts(torch.stack([x, y]))],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_are_what_they_are_alone(kernels, name):
    if kernels.place not in ("cpu", "sanitized-cpu"):
        pytest.skip("about the CPU's stores")
    x, y = torch.randn(2, ROWS, WIDTH)
    whole = FUNCTIONS[name](x, y)
    few = FUNCTIONS[name](x[PICKED], y[PICKED])
    for a, b in zip(whole, few, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a[PICKED], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_sequence_is_moved(kernels, dtype):
    if kernels.place not in ("cpu", "sanitized-cpu"):
        pytest.skip("about the CPU's stores")
    x = torch.randn(1024, 16, 1024).to(dtype)
    turned = ops.sequence_pack(x, 4, out_dim=1)
    assert torch.equal(turned, x.view(4, 256, 16, 1024).transpose(1, 2))
    assert torch.equal(ops.sequence_join(turned, dim=1, out_dim=0), x)
    zigzag = ops.sequence_pack(x, 4, zigzag=True)
    for rank in range(4):
        parts = x.view(8, 128, 16, 1024)
        assert torch.equal(zigzag[rank], torch.cat([parts[rank], parts[7 - rank]]))
        assert torch.equal(ops.sequence_part(x, 4, rank, zigzag=True), zigzag[rank])
