"""Which implementation an op runs on: the compiled kernels of `megalm._C`, or plain PyTorch.

auto:      the kernel where it serves the tensors at hand, else the reference. The default.
native:    the kernel, or an error that names the argument which it does not serve.
reference: plain PyTorch always.

The choice is the process's, made explicitly with `set_backend` or, for a scope, `use_backend`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from megalm.config.errors import ConfigError

# torch is loaded before the extension, which then shares torch's own OpenMP runtime and its number of threads.
try:
    from megalm import _C as _found  # type: ignore[attr-defined]

    _library: ModuleType | None = _found
except ImportError as error:
    _library = None
    if "cannot import name '_C'" not in str(error):
        warnings.warn(f"megalm._C does not load, the plain PyTorch ops serve: {error}. Run `make build`.", stacklevel=2)

CHOICES = ("auto", "native", "reference")
_choice = "auto"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU_DTYPES = (torch.float32, torch.bfloat16)
# Subclasses (DTensor, fake tensors) go through the dispatcher: their data is not where data_ptr says.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def library() -> ModuleType | None:
    """The compiled extension, None where it was not built."""
    return _library


def loaded_library() -> ModuleType:
    """The compiled extension, by those who know that it is there."""
    assert _library is not None
    return _library


def current_backend() -> str:
    """The choice in force: auto, native or reference."""
    return _choice


def set_backend(choice: str) -> None:
    """Choose for the whole process. Errors: ConfigError on an unknown choice, or `native` without the extension."""
    global _choice
    if choice not in CHOICES:
        raise ConfigError(f"ops.backend={choice}: not one of {', '.join(CHOICES)}.")
    if choice == "native" and _library is None:
        raise ConfigError(
            "ops.backend=native, but the extension megalm._C is not built here: run `make build` (g++ or clang++ is "
            "needed), or set ops.backend=auto."
        )
    _choice = choice


@contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """`set_backend` for a scope."""
    before = _choice
    set_backend(choice)
    try:
        yield
    finally:
        set_backend(before)


@contextmanager
def use_library(module: ModuleType) -> Iterator[None]:
    """Run on another build of the extension for a scope: the tests' build with emulated CUDA kernels."""
    global _library
    before = _library
    _library = module
    try:
        yield
    finally:
        _library = before


def _unserved(tensors: dict[str, Tensor | None]) -> str | None:
    """Why the kernel does not serve these tensors, None if it does."""
    library = _library
    if library is None:
        return "the extension megalm._C is not built: run `make build`"
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = tensor
            if tensor.device.type == "cpu":
                allowed = tuple(DTYPE_CODES) if library.emulated else _CPU_DTYPES
            elif tensor.device.type == "cuda" and library.has_cuda and not library.emulated:
                allowed = tuple(DTYPE_CODES)
            elif tensor.device.type == "cuda":
                return f"{name} is on {tensor.device}, and megalm._C was built without CUDA"
            else:
                return f"{name} is on {tensor.device}; kernels are for cpu and cuda"
            if tensor.dtype not in allowed:
                return f"{name} is {tensor.dtype}; allowed there: {', '.join(map(str, allowed))}"
        if tensor.dtype != first.dtype:
            return f"{name} is {tensor.dtype}, but {next(iter(tensors))} is {first.dtype}"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, but {next(iter(tensors))} is on {first.device}"
        if type(tensor) not in _PLAIN:
            return f"{name} is a {type(tensor).__name__}"
    return None


def use_native(op: str, **tensors: Tensor | None) -> bool:
    """Whether the kernel runs `op` on these tensors, which must agree in dtype and device; the first decides.

    Errors: ConfigError with backend native where it does not.
    """
    if _choice == "reference":
        return False
    why = _unserved(tensors)
    if why is None:
        return True
    if _choice == "native":
        raise ConfigError(f"ops.backend=native: {op} has no kernel for its arguments: {why}. Or set ops.backend=auto.")
    return False


def place(tensor: Tensor) -> tuple[int, int]:
    """Where a kernel runs: (-1, 0) on the CPU, else (device index, current stream)."""
    if tensor.is_cuda:
        index = tensor.get_device()
        return index, torch._C._cuda_getCurrentRawStream(index)
    return (0, 0) if _library is not None and _library.emulated else (-1, 0)


def address(tensor: Tensor | None) -> int:
    """A tensor's address, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def require(condition: bool, message: str) -> None:
    """Refuse bad arguments of an op: ConfigError with the message."""
    if not condition:
        raise ConfigError(message)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory of this process, so that large CPU tensors cost no page faults after the first
    step. The process then holds its peak until it ends. Returns False where there is no such setting.
    """
    return _library is not None and bool(_library.keep_freed_memory())
