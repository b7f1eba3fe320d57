"""The files that stages leave for one another: raw arrays, whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

DEALT = 1 << 18  # records copied at a time


def name_shard_file(folder: str, number: int, part: str) -> str:
    """Name where a shard's file of this kind is."""
    return os.path.join(folder, f"{number:06d}.{part}")


def save(path: str, array: np.ndarray) -> None:
    """Raw, aside, and renamed: a task that runs twice leaves one whole file."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "wb") as file:
        file.write(np.ascontiguousarray(array).data)
    os.replace(partial, path)


@contextlib.contextmanager
def write_whole(path: str) -> Iterator[BinaryIO]:
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
    """Load elements [start, stop) of a file that `save` left; stop -1: the end."""
    size = np.dtype(dtype).itemsize
    return np.fromfile(path, dtype, -1 if stop < 0 else stop - start, offset=start * size)


def map_array(path: str, dtype: Any) -> np.ndarray:
    """The same, of which only what is looked at is read."""
    return np.memmap(path, dtype, "r") if os.path.getsize(path) else np.empty(0, dtype)


def deal(owner: np.ndarray, parts: int, records: np.ndarray, path: str) -> None:
    """Writes the records grouped by their part, and where each group begins (int64 [parts + 1]) under PATH.bounds."""
    deal_some(owner, parts, lambda numbers: records[numbers], DEALT, path)


def deal_some(owner: np.ndarray, parts: int, records: Callable[[np.ndarray], np.ndarray], most: int, path: str) -> None:
    """The same with records that are made when they are written, `most` of them at a time, by their numbers."""
    order = np.argsort(owner, kind="stable")
    save(f"{path}.bounds", np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=parts)))).astype("<i8"))
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "wb") as file:
        for start in range(0, len(order), most):
            file.write(np.ascontiguousarray(records(order[start : start + most])).data)
    os.replace(partial, path)


def count_dealt(path: str, part: int) -> int:
    """Count how many records of what `deal` wrote are one part's."""
    start, stop = load(f"{path}.bounds", "<i8", part, part + 2)
    return int(stop - start)


def load_dealt(path: str, part: int, dtype: Any, stop_part: int | None = None) -> np.ndarray:
    """Load the records of one part, or of some after one another, of what `deal` wrote."""
    start, stop = load(f"{path}.bounds", "<i8", part, (part + 1 if stop_part is None else stop_part) + 1)[[0, -1]]
    return load(path, dtype, int(start), int(stop)) if stop > start else np.empty(0, dtype)
