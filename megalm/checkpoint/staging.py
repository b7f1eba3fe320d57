"""Host copies of what one rank saves, and their checksums, taken while the step waits."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.planner import WriteItem

from megalm.checkpoint.container import ALIGNMENT
from megalm.checkpoint.manifest import compute_checksum
from megalm.ops.backend import find_library

# Bytes copied and then checksummed at a time where the compiled extension is not there to do both in one pass: they are
# still in a core's cache when they are read for the second time.
BLOCK_BYTES = 256 << 10
# Below this many bytes one thread does it all: waking others would take longer.
THREAD_BYTES = 8 << 20
# More threads than this are not faster: a few saturate a socket's memory.
MOST_THREADS = 8


@dataclass(frozen=True)
class StagedChunk:
    """One piece, copied: its values lie in the staging buffer until the next save."""

    item: WriteItem
    values: np.ndarray
    """The raw bytes."""
    checksums: Callable[[], list[str]]
    """Of all chunks of the save; waits where they are still being computed."""
    number: int
    """Which of them is this chunk's."""

    @property
    def xxh3(self) -> str:
        return self.checksums()[self.number]


@dataclass(frozen=True)
class _Place:
    """Where one piece comes from and goes to, as tensors and as raw bytes."""

    item: WriteItem
    tensor: torch.Tensor
    target: torch.Tensor
    values: np.ndarray
    """`target`'s bytes."""
    source: np.ndarray | None
    """`tensor`'s bytes, where they lie together in host memory."""


class Staging:
    """One host buffer for all pieces of a rank, allocated at the first save and used again by each.

    Memory: as many bytes as this rank writes; page-locked when the tensors are on an accelerator.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places: list[_Place] = []
        self._shares: list[list[int]] = []
        self._pool: ThreadPoolExecutor | None = None

    def arrange(self, pieces: Sequence[tuple[WriteItem, torch.Tensor]]) -> None:
        """Find each piece its place in the buffer; the tensors' memory must stay the same until the next call."""
        starts, total = [], 0
        for _, tensor in pieces:
            starts.append(total)
            total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._places = []
        self._reserve(total, any(tensor.device.type != "cpu" for _, tensor in pieces))
        host = self._buffer.numpy()
        for start, (item, tensor) in zip(starts, pieces, strict=True):
            target = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            source = None
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                source = tensor.reshape(-1).view(torch.uint8).numpy()
            self._places.append(_Place(item, tensor, target, host[start : start + tensor.nbytes], source))
        threads = min(torch.get_num_threads(), MOST_THREADS) if total >= THREAD_BYTES else 1
        self._shares = _deal([place.values.nbytes for place in self._places], threads)

    def take(self) -> list[StagedChunk]:
        """Copy the arranged tensors as they are now, and checksum them.

        A checksum is taken from the tensor itself where that is contiguous in host memory, so that a copy gone wrong
        or a buffer changed later is found at the next load; from the copy where the tensor is on an accelerator, and then
        the caller does not wait for it.
        """
        found: Callable[[], list[str]]
        if any(place.tensor.device.type != "cpu" for place in self._places):
            for place in self._places:
                place.target.copy_(place.tensor, non_blocking=True)
            torch.accelerator.synchronize()
            found = self._threads().submit(_checksums, [place.values for place in self._places]).result
        else:
            found = partial(_same, self._copy())
        return [StagedChunk(place.item, place.values, found, n) for n, place in enumerate(self._places)]

    def close(self) -> None:
        """Give the buffer and the threads back."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._places, self._shares = [], []
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _copy(self) -> list[str]:
        """Copy everything, each thread its share; the checksums in the pieces' order."""
        sums = [""] * len(self._places)

        def work(share: list[int]) -> None:
            for number in share:
                sums[number] = _copy_one(self._places[number])

        others = [self._threads().submit(work, share) for share in self._shares[1:]]
        work(self._shares[0])
        for other in others:
            other.result()
        return sums

    def _reserve(self, total: int, pinned: bool) -> None:
        if self._buffer.numel() < total or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.zeros(total, dtype=torch.uint8, pin_memory=pinned)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="checkpoint-copy")
        return self._pool


def _copy_one(place: _Place) -> str:
    """Copy one piece block by block; the checksum of what it was copied from."""
    if place.source is None:
        place.target.copy_(place.tensor)
        return compute_checksum(place.values)
    compiled = find_library()
    if compiled is not None and place.source.nbytes > 240:  # in one pass, past the caches, without Python's lock
        value = compiled.copy_digest(place.source.ctypes.data, place.values.ctypes.data, place.source.nbytes)
        return f"{value:016x}"
    digest = xxhash.xxh3_64()
    for start in range(0, place.source.nbytes, BLOCK_BYTES):
        block = place.source[start : start + BLOCK_BYTES]
        np.copyto(place.values[start : start + BLOCK_BYTES], block)
        digest.update(block.data)
    return digest.hexdigest()


def _deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The pieces' numbers in `count` shares of about the same size: the largest first, onto the smallest share."""
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        least = load.index(min(load))
        shares[least].append(number)
        load[least] += sizes[number]
    return shares


def _checksums(sources: Sequence[np.ndarray]) -> list[str]:
    return [compute_checksum(source) for source in sources]


def _same(value: list[str]) -> list[str]:
    return value
