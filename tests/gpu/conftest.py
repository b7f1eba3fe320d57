"""Tests that need a GPU, beyond those of single ops (tests/ops runs on CUDA by itself where there is one).

MEGALM_TEST_DEVICE=cpu runs them on the CPU instead: that tries the tests, not what they are about.
"""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before anything multiplies: determinism asks for it

DEVICE = os.environ.get("MEGALM_TEST_DEVICE", "cuda")


@pytest.fixture
def device():
    """The GPU; what is not deterministic is as it was afterwards."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    before = torch.get_deterministic_debug_mode()
    torch.manual_seed(0)
    yield torch.device("cuda", 0) if DEVICE == "cuda" else torch.device(DEVICE)
    torch.set_deterministic_debug_mode(before)
