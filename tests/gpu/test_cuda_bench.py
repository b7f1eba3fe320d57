"""The benchmark's clock on a GPU: graphs where they can be, and nothing left broken where they cannot."""

import pytest
import torch

from megalm import ops
from megalm.ops import backend
from tools.bench.kernels.kernels import _Timer


def test_what_waits_for_the_gpu_is_timed_without_a_graph(device):
    if device.type != "cuda":
        pytest.skip("about the GPU's graphs")
    x = torch.randn(1 << 20, device=device)
    waiting = _Timer(lambda: x.sum().item(), "cuda")
    assert not waiting.captured and waiting() > 0.0
    plain = _Timer(lambda: x.add_(1.0), "cuda")
    assert plain.captured and plain() > 0.0
    assert not torch.cuda.is_current_stream_capturing()


def test_the_optimizers_kernels_do_not_wait(device):
    """Once they have been called: where tensors begin and end is copied to the GPU then."""
    if device.type != "cuda" or backend.find_library() is None or not backend.find_library().has_cuda:
        pytest.skip("needs the CUDA kernels")
    w, g, m, v = torch.rand(4, 3000, device=device)

    def update():
        squares = ops.update_squares(g, v, [1000, 2000], beta2=0.95, eps=1e-8, step=2)
        ops.adamw_(w, g, m, v, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=2)
        return squares, ops.l2_norm_nonfinite([g, v])

    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
