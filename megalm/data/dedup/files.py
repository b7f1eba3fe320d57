"""The files that stages leave for one another: raw arrays, whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np


def shard_path(folder: str, number: int, part: str) -> str:
    """Where a shard's file of this kind is."""
    return os.path.join(folder, f"{number:06d}.{part}")


def save(path: str, array: np.ndarray) -> None:
    """Raw, aside, and renamed: a task that runs twice leaves one whole file."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "wb") as file:
        file.write(np.ascontiguousarray(array).data)
    os.replace(partial, path)


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[BinaryIO]:
    """A file for a result, which is there when it was written to its end."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def load(path: str, dtype: Any, start: int = 0, stop: int = -1) -> np.ndarray:
    """Elements [start, stop) of a file that `save` left; stop -1: the end."""
    size = np.dtype(dtype).itemsize
    return np.fromfile(path, dtype, -1 if stop < 0 else stop - start, offset=start * size)


def deal(owner: np.ndarray, parts: int, records: np.ndarray, path: str) -> None:
    """Writes the records grouped by their part, and where each group begins (int64 [parts + 1]) under PATH.bounds."""
    order = np.argsort(owner, kind="stable")
    save(f"{path}.bounds", np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=parts)))).astype("<i8"))
    save(path, records[order])


def dealt_to(path: str, part: int, dtype: Any) -> np.ndarray:
    """The records of one part of what `deal` wrote."""
    start, stop = load(f"{path}.bounds", "<i8", part, part + 2)
    return load(path, dtype, int(start), int(stop)) if stop > start else np.empty(0, dtype)
