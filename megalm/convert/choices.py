"""Words that a conversion is asked for by; here without torch, so that a command line can list them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.config.registry import Registry

if TYPE_CHECKING:
    from megalm.convert.source import Source


@dataclass(frozen=True)
class Format:
    """How a plugin's folders are told, read and written."""

    is_one: Callable[[Path], bool]
    """Tells from what lies in a folder that it is of this format."""
    open: Callable[[Path], Source]
    """Reads a folder; see `Source`."""
    write: Callable[[Source, Path], int]
    """Writes every weight into an empty folder, and returns the number of tensors written. It is opened again at once, and
    each weight must be found."""


FORMATS: Registry[Format | None] = Registry("format", "--to", {"huggingface": None, "megalm": None, "megatron": None})
"""Formats of a folder with weights; None: megalm's own code reads and writes it."""

SPELLINGS = ("te", "plain", "legacy", "legacy-2.6")
"""Generations of Megatron-LM's tensor names (`megalm/convert/megatron_names.py` has them)."""


def register_format(name: str, format: Format) -> None:
    """Let `megalm convert ... --to NAME` write folders of this format, and every tool read them.

    Errors: ValueError where the name is taken.
    """
    FORMATS.register(name, format)
