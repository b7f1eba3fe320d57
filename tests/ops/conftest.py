"""Where the kernels under test run.

cpu:           megalm._C, each instruction set that this machine has.
cuda:          megalm._C on a GPU, where there is one.
emulated, sanitized-cpu: the tests' own build under AddressSanitizer (see tests/csrc/test_sanitized.py, which starts
               these tests again in a process that has it): CUDA kernels under the emulator, and the CPU kernels.
"""

import importlib.util
import os
import zlib
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from megalm.ops import backend
from megalm.ops.backend import use_backend, use_library

SANITIZED = os.environ.get("MEGALM_TEST_SANITIZED_LIBRARY")


def _places():
    if SANITIZED:
        return ["emulated", "sanitized-cpu"]
    if backend.find_library() is None:
        return [pytest.param("cpu", marks=pytest.mark.skip(reason="megalm._C is not built"))]
    places = ["cpu"]
    if torch.cuda.is_available() and backend.find_library().has_cuda:
        places.append("cuda")
    return places


def _sanitized_library():
    spec = importlib.util.spec_from_file_location("_C", SANITIZED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_LOADED = _sanitized_library() if SANITIZED else None


@pytest.fixture(params=_places())
def kernels(request):
    """The place; the backend is native, fresh memory is NaN. `.device` is where its tensors live."""
    place = request.param
    with ExitStack() as stack:
        if place == "emulated":
            # Threads in order, reversed or shuffled: each op meets all three over its tests.
            _LOADED.set_emulator_order((0, 1, 7)[zlib.crc32(request.node.nodeid.encode()) % 3])
            stack.enter_context(use_library(_LOADED))
        elif place == "sanitized-cpu":
            stack.enter_context(use_library(SimpleNamespace(**{**vars(_LOADED), "emulated": False, "has_cuda": False})))
        stack.enter_context(use_backend("native"))
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.manual_seed(0)
        yield SimpleNamespace(
            place=place,
            device="cuda" if place == "cuda" else "cpu",
            half=place in ("cuda", "emulated"),
            small=place == "emulated",
        )
        torch.use_deterministic_algorithms(before)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16", "fp16"])
def dtype(request, kernels):
    if request.param == torch.float16 and not kernels.half:
        pytest.skip("the CPU kernels serve fp32 and bf16")
    return request.param
