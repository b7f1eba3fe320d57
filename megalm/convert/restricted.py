"""Reading pickles that others wrote, without running anything they bring.

PyTorch's restricted loader builds tensors and plain containers only. Beside those, a Megatron checkpoint holds its
arguments (a plain `argparse.Namespace`) and objects of Megatron's, Transformer Engine's and NumPy's own classes
(enums, random states) that a conversion does not need: these become inert placeholders, whatever they are. Anything
of any other module is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalm.config.errors import ConfigError
from megalm.tokenizer.damage import describe_damage

PLACEHOLDER_MODULES = ("megatron", "transformer_engine", "numpy", "signal", "_codecs")


class Placeholder:
    """Stands for an object of a class that is not loaded. Keeps nothing but its arguments."""

    def __init__(self, *arguments: Any, **_: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __reduce__(self) -> Any:
        return (Placeholder, self.arguments)

    def __hash__(self) -> int:
        return id(self)


def load(file: Path | io.BytesIO) -> Any:
    """Load a file that torch.save wrote, on the CPU, tensors mapped from the file where that is possible.

    ConfigError if it holds an object of a module that is neither PyTorch's nor on the list of placeholders.
    """
    _check_start(file)
    with _without_declared():
        return _load(file)


def _check_start(file: Path | io.BytesIO) -> None:
    """Stops at a file that torch.save did not write, and says what it is where its first bytes tell."""
    if isinstance(file, io.BytesIO):
        return
    try:
        with open(file, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    what = describe_damage(start)
    if what is None and not start.startswith((b"PK", b"\x80")) and start[257:262] != b"ustar":
        what = f"damaged, or not a file that torch.save wrote (it begins with {start[:12]!r}); copy it again"
    if what is not None:
        raise ConfigError(f"{file}: {what}")


def _load(file: Path | io.BytesIO) -> Any:
    mapped = isinstance(file, Path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
    except (ValueError, RuntimeError):  # the format of PyTorch before 1.6, which cannot be mapped or examined
        names, mapped = ["argparse.Namespace"], False
    except OSError as error:
        raise _damaged(file, error) from None
    except pickle.UnpicklingError as error:
        raise _refused(file, error) from None
    allowed: list[Any] = []
    for name in names:
        if name == "argparse.Namespace":
            allowed.append(argparse.Namespace)
        elif name.split(".")[0] in PLACEHOLDER_MODULES:
            # A class of its own for each name: the loader goes by the class.
            allowed.append((type(name.rsplit(".", 1)[-1], (Placeholder,), {}), name))
    try:
        torch.serialization.add_safe_globals(allowed)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise _refused(file, error) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        raise _damaged(file, error) from None


@contextlib.contextmanager
def _without_declared() -> Iterator[None]:
    """Build no class that another library declared safe; they are declared again at the end."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)


def _refused(file: Path | io.BytesIO, error: Exception) -> ConfigError:
    where = file if isinstance(file, Path) else "checkpoint object"
    reason = " ".join(str(error).split())
    found = (
        reason.split("GLOBAL ", 1)[-1].split(" was ", 1)[0].split(". Please", 1)[0] if "GLOBAL" in reason else reason
    )
    return ConfigError(
        f"{where}: refused, it holds {found[:200]}, which may run code when loaded; only tensors and arguments are read"
    )


def _damaged(file: Path | io.BytesIO, error: Exception) -> ConfigError:
    where = file if isinstance(file, Path) else "checkpoint object"
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = re.split(r"[.:;] |\. ?This|, please", reason)[0][
        :120
    ]  # torch's first words; its paragraphs do not help here
    return ConfigError(f"{where}: damaged or cut short ({reason}); copy it again")


class _MetadataUnpickler(pickle.Unpickler):
    """The index of a torch.distributed.checkpoint: its own dataclasses and torch's dtypes, sizes and layouts.

    Megatron keeps the plans of all ranks in it, too: they are dataclasses of torch's planner.
    """

    ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
    ALLOWED = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch", "device"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format
        ):
            return getattr(torch, name)
        found = None
        if (module, name) in self.ALLOWED:
            found = super().find_class(module, name)
        elif module in self.ALLOWED_MODULES:
            found = super().find_class(module, name)
            if not isinstance(found, type) or not (
                hasattr(found, "__dataclass_fields__") or issubclass(found, enum.Enum)
            ):
                found = None
        elif module.split(".")[0] in PLACEHOLDER_MODULES:
            found = type(name.rsplit(".", 1)[-1], (Placeholder,), {})
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return found


def load_metadata(file: Path) -> Any:
    """Load the `.metadata` of a torch.distributed.checkpoint folder."""
    try:
        with open(file, "rb") as stream:
            return _MetadataUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise _refused(file, error) from None
    except (EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise _damaged(file, error) from None
