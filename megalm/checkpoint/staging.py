"""Host copies of what one rank saves, and their checksums, taken while the step waits."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.distributed.checkpoint.planner import WriteItem

from megalm.checkpoint.container import ALIGNMENT
from megalm.checkpoint.manifest import checksum

# Above this many bytes the checksums run in a second thread, behind the copy; below it, starting them costs more.
THREAD_BYTES = 8 << 20
# Bytes handed to that thread at a time: small tensors would otherwise cost a wake-up each.
BATCH_BYTES = 4 << 20


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


class Staging:
    """One host buffer for all pieces of a rank, allocated at the first save and used again by each.

    Memory: as many bytes as this rank writes; page-locked when the tensors are on an accelerator.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._hasher: ThreadPoolExecutor | None = None

    def take(self, pieces: Sequence[tuple[WriteItem, torch.Tensor]]) -> list[StagedChunk]:
        """Copy the tensors and checksum them.

        A checksum is taken from the tensor itself where that is contiguous in host memory, so that a copy gone wrong
        or a buffer changed later is found at the next load; from the copy where the tensor is on an accelerator, and then
        the caller does not wait for it.
        """
        starts, total = [], 0
        for _, tensor in pieces:
            starts.append(total)
            total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        on_device = any(tensor.device.type != "cpu" for _, tensor in pieces)
        self._reserve(total, on_device)
        targets = [
            self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, (_, tensor) in zip(starts, pieces, strict=True)
        ]
        host = self._buffer.numpy()
        raw = [host[start : start + tensor.nbytes] for start, (_, tensor) in zip(starts, pieces, strict=True)]
        sources = []
        batches: list[Future[list[str]]] = []
        waiting = 0
        for number, (target, data, (_, tensor)) in enumerate(zip(targets, raw, pieces, strict=True), start=1):
            target.copy_(tensor, non_blocking=on_device)
            sources.append(data if on_device else _source(tensor, data))
            waiting += data.nbytes
            last = number == len(pieces)
            if not on_device and total >= THREAD_BYTES and (waiting >= BATCH_BYTES or last):
                batches.append(self._threads().submit(_checksums, sources))
                sources, waiting = [], 0
        found: Callable[[], list[str]]
        if on_device:
            torch.accelerator.synchronize()
            found = self._threads().submit(_checksums, sources).result
        else:
            sums = [digest for batch in batches for digest in batch.result()] + _checksums(sources)
            found = partial(_same, sums)
        return [StagedChunk(item, data, found, n) for n, ((item, _), data) in enumerate(zip(pieces, raw, strict=True))]

    def close(self) -> None:
        """Give the buffer and the thread back."""
        if self._hasher is not None:
            self._hasher.shutdown()
            self._hasher = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, total: int, pinned: bool) -> None:
        if self._buffer.numel() < total or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.zeros(total, dtype=torch.uint8, pin_memory=pinned)

    def _threads(self) -> ThreadPoolExecutor:
        if self._hasher is None:
            self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-checksum")
        return self._hasher


def _checksums(sources: Sequence[np.ndarray]) -> list[str]:
    return [checksum(source) for source in sources]


def _same(value: list[str]) -> list[str]:
    return value


def _source(tensor: torch.Tensor, copy: np.ndarray) -> np.ndarray:
    """The bytes to checksum: the tensor's own where they lie together, else the copy's."""
    if not tensor.is_contiguous():
        return copy
    return tensor.reshape(-1).view(torch.uint8).numpy()
