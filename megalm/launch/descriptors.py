"""Open files that a process hands to one that it starts: memory without a name, locks, a screen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any


class Descriptor:
    """An open file's number; what arrives in a started process is a number of its own, for the same open file."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], Descriptor], tuple[Any]]:
        return _arrive, (reduction.DupFd(self.number),)


def _arrive(sent: Any) -> Descriptor:
    return Descriptor(sent.detach())


def make_nameless_file(name: str) -> Descriptor:
    """Make a file that lies in memory, grows as it is written, and is gone with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return Descriptor(os.memfd_create(f"megalm-{name}"))
    with tempfile.TemporaryFile() as file:
        return Descriptor(os.dup(file.fileno()))
