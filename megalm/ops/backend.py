"""Which implementation an op runs on: the compiled kernels of `megalm._C`, a vendor's, or plain PyTorch.

auto:      the kernel where it serves the tensors at hand, else the reference. The default. Where megalm._C has no CUDA
           kernels and there is a GPU, Transformer Engine and apex come before the reference, if they are installed.
native:    the kernel, or an error that names the argument which it does not serve.
apex, te:  NVIDIA's apex or Transformer Engine for the ops that they have (megalm.ops.vendors), else as auto.
reference: plain PyTorch always.

The choice is the process's, made explicitly with `set_backend` or, for a scope, `use_backend`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.ops import vendors
from megalm.ops.vendors import Vendor

_SOURCES = Path(__file__).resolve().parents[2] / "csrc"


def explain_other_sources(module: ModuleType, sources: Path = _SOURCES) -> str | None:
    """Explain why `module` does not fit the sources beside this package; None where it does, or where there are none.

    Its functions take addresses and sizes on trust: those of another version must not be called.
    """
    digest = sources / "contract.py"
    if not digest.exists():
        return None
    spec = importlib.util.spec_from_file_location("megalm_contract", digest)
    assert spec is not None and spec.loader is not None
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    if getattr(module, "contract", None) == contract.digest(sources):
        return None
    return f"{module.__file__} was built from other sources than {sources}: run `make build`"


def _load() -> tuple[ModuleType | None, str]:
    """Load the extension, or None and why."""
    # torch is loaded before the extension, which then shares torch's own OpenMP runtime and its number of threads.
    try:
        from megalm import _C as module  # type: ignore[attr-defined]
    except ImportError as error:
        if "cannot import name '_C'" in str(error):
            return None, "the extension megalm._C is not built: run `make build` (g++ or clang++ is needed)"
        why = f"megalm._C does not load ({error}): run `make build`"
    else:
        stale = explain_other_sources(module)
        if stale is None:
            return module, ""
        why = stale
    warnings.warn(f"{why}. Until then the plain PyTorch ops serve, more slowly.", stacklevel=3)
    return None, why


_library, _missing = _load()

CHOICES = ("auto", "native", "apex", "te", "reference")
_choice = "auto"
_vendors: tuple[Vendor, ...] = ()

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU_DTYPES = (torch.float32, torch.bfloat16)
# Subclasses (DTensor, fake tensors) go through the dispatcher: their data is not where data_ptr says.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def find_library() -> ModuleType | None:
    """Find the compiled extension, None where it was not built."""
    return _library


def get_library() -> ModuleType:
    """The compiled extension. Call it only where `use_native` said yes."""
    assert _library is not None
    return _library


def get_backend() -> str:
    """The choice in force: one of CHOICES."""
    return _choice


def set_backend(choice: str) -> None:
    """Choose for the whole process.

    Errors: ConfigError on an unknown choice, `native` without the extension, a vendor that is not installed.
    """
    global _choice, _vendors
    if choice not in CHOICES:
        raise ConfigError(f"ops.backend={choice}: not one of {', '.join(CHOICES)}.")
    if choice == "native" and _library is None:
        raise ConfigError(f"ops.backend=native, but {explain_missing()}. Or set ops.backend=auto.")
    found: tuple[Vendor, ...] = ()
    if choice in ("apex", "te"):
        found = (vendors.load(choice),)
        if found[0].why is not None:
            raise ConfigError(f"ops.backend={choice}, but {found[0].why}. Or set ops.backend=auto.")
    elif choice == "auto" and torch.cuda.is_available() and not (_library is not None and _library.has_cuda):
        found = tuple(vendor for vendor in map(vendors.load, ("te", "apex")) if vendor.why is None)
    _choice, _vendors = choice, found


def find_vendor(op: str, tensor: Tensor) -> Callable[..., Any] | None:
    """Find a vendor's function for the op on tensors like this one; None: the kernel or the reference serves."""
    for found in _vendors:
        if found.serves(op, tensor):
            return found.functions[op]
    return None


def get_vendors() -> tuple[Vendor, ...]:
    """The vendors that `find_vendor` asks, in their order."""
    return _vendors


def explain_missing() -> str:
    """Explain why there is no extension; empty where there is."""
    return "" if _library is not None else _missing or "the extension megalm._C is not built: run `make build`"


@contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """`set_backend` for a scope."""
    global _choice, _vendors
    before = _choice, _vendors
    set_backend(choice)
    try:
        yield
    finally:
        _choice, _vendors = before


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


class Paper(ModuleType):
    """Stands for the extension where tensors have no data (the meta device): each kernel returns at once.

    With `use_library` around a step, autograd keeps what it keeps with the kernels.
    """

    emulated = has_cuda = False

    def __init__(self) -> None:
        super().__init__("paper")

    def __getattr__(self, name: str) -> Any:
        return 1 if name.isupper() else lambda *_: None


def _unserved(tensors: dict[str, Tensor | None]) -> str | None:
    """Why the kernel does not serve these tensors, None if it does."""
    library = _library
    if library is None:
        return explain_missing()
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = tensor
            if tensor.device.type == "cpu":
                allowed = tuple(DTYPE_CODES) if library.emulated else _CPU_DTYPES
            elif tensor.device.type == "meta" and isinstance(library, Paper) or _has_cuda(library, tensor):
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


def _has_cuda(library: ModuleType, tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and library.has_cuda and not library.emulated


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


def find_address(tensor: Tensor | None) -> int:
    """Find a tensor's address, 0 for none."""
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
