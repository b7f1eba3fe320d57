"""Snapshots of the run in host memory: the last clean states, a few steps to a few hundred steps old.

With lags (16, 64, 256) three states are held. Every 16 steps the youngest is taken anew; the one that it replaces
becomes the second every 64 steps, and the second the third every 256 steps (or at once where there is none yet):

    at step   0   16   32   48   64   80  ...  128  ...  256  272
    [0]       0   16   32   48   64   80       128       256  272      age  0 to  16
    [1]            0   16   16   48   48       112       240  240      age 16 to  80
    [2]                 0    0    0    0         0       176  176      age 80 to 336

so that, whatever the step, one state is at least 16 and one at least 80 steps old, once the run is.
Each rank keeps its own share only; the buffers are allocated once and reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.random_state import restore_random_state, take_random_state
from megalm.config.errors import ConfigError
from megalm.parallel.slices import Box


@dataclass
class Snapshot:
    """One state of the run on this rank."""

    step: int
    state: dict[str, Any]
    """The trainer's small state."""
    random: dict[str, Any]
    tensors: list[torch.Tensor] = field(repr=False, default_factory=list)
    probe: float | None = None
    """The probe's loss at that state, once somebody asked for it."""


class SnapshotRing:
    """Snapshots at several lags.

    Args:
        lags: steps, each a multiple of the one before; empty: nothing is ever kept.
    """

    def __init__(self, lags: Sequence[int]):
        self.lags = tuple(lags)
        self.slots: list[Snapshot | None] = [None] * len(self.lags)
        self._moved = [0] * len(self.lags)
        self._spare: list[list[torch.Tensor]] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def due(self, step: int) -> bool:
        return bool(self.lags) and step % self.lags[0] == 0

    def capture(self, step: int, boxes: Sequence[Box], state: dict[str, Any]) -> None:
        """Copy the state to host memory, and move the older snapshots along."""
        for slot in range(len(self.lags) - 1, 0, -1):
            younger = self.slots[slot - 1]
            turn = step // self.lags[slot]
            if younger is not None and (self.slots[slot] is None or turn != self._moved[slot]):
                self._release(self.slots[slot])
                self.slots[slot], self.slots[slot - 1] = younger, None
                self._moved[slot] = turn
        self._release(self.slots[0])
        tensors = self._spare.pop() if self._spare else [_host_like(box.tensor) for box in boxes]
        self._copy(tensors, boxes)
        self.slots[0] = Snapshot(step, state, take_random_state(), tensors)

    def _copy(self, tensors: Sequence[torch.Tensor], boxes: Sequence[Box]) -> None:
        """From a GPU the copies go on beside the next step's passes, which only read what is copied; see `settle`."""
        device = boxes[0].tensor.device if boxes else torch.device("cpu")
        if device.type != "cuda":
            for tensor, box in zip(tensors, boxes, strict=True):
                tensor.copy_(box.tensor)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for tensor, box in zip(tensors, boxes, strict=True):
                tensor.copy_(box.tensor, non_blocking=True)
        self._copied = self._stream.record_event()

    def settle(self) -> None:
        """Before anything writes to the tensors that were captured: the device waits for the copies, the host does not."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def _finish(self) -> None:
        """The host waits for the copies: before it reads them."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def choose(self, latest: int, attempt: int = 1) -> Snapshot | None:
        """Choose the `attempt`-th youngest snapshot of at most step `latest` (the oldest of them, if there are not so many)."""
        self._finish()
        fitting = [s for s in self.slots if s is not None and s.step <= latest]
        return fitting[min(attempt, len(fitting)) - 1] if fitting else None

    def youngest(self) -> Snapshot | None:
        """The last snapshot taken, whole."""
        self._finish()
        return next((s for s in self.slots if s is not None), None)

    def restore(self, snapshot: Snapshot, boxes: Sequence[Box]) -> None:
        """Write the snapshot's tensors and random state back; the caller restores the rest from `snapshot.state`."""
        for tensor, box in zip(snapshot.tensors, boxes, strict=True):
            box.tensor.copy_(tensor)
        restore_random_state(snapshot.random)
        for slot, kept in enumerate(self.slots):
            if kept is not None and kept.step > snapshot.step:
                self._release(kept)
                self.slots[slot] = None

    def clear(self) -> None:
        """Forget everything: the run went back to a durable checkpoint."""
        for slot, kept in enumerate(self.slots):
            self._release(kept)
            self.slots[slot] = None

    def _release(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self._spare.append(snapshot.tensors)


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def count_held_bytes(lags: Sequence[int], boxes: Sequence[Box]) -> int:
    """Host memory of this rank's snapshots."""
    return len(lags) * sum(box.tensor.numel() * box.tensor.element_size() for box in boxes)


def check_memory(lags: Sequence[int], boxes: Sequence[Box], *, local_ranks: int, limit_gb: float | None) -> int:
    """The ring's bytes on this rank. Errors: ConfigError, with the figures, if they do not fit."""
    wanted = count_held_bytes(lags, boxes)
    free = measure_free_memory()
    if limit_gb is not None:
        allowed, why = limit_gb * 1e9, f"guard.ring_memory_gb={limit_gb:g}"
    elif free is None:
        return wanted
    else:
        allowed = free / 2 / local_ranks
        why = f"half of the {free / 1e9:.1f} GB that are free, shared by {local_ranks} rank{'s' * (local_ranks > 1)}"
    if wanted <= allowed:
        return wanted
    one = wanted // len(lags)
    fit = int(allowed // one)
    instead = f"guard.snapshot_lags={list(lags[:fit])}".replace(" ", "")
    raise ConfigError(
        f"guard.snapshot_lags={list(lags)}: {len(lags)} snapshots of {one / 1e9:.3g} GB need {wanted / 1e9:.3g} GB of host "
        f"memory on each rank, but only {allowed / 1e9:.3g} GB are allowed ({why}). "
        f"{fit or 'None'} would fit: {instead}, or shard the optimizer with parallel=zero1."
    )


def measure_free_memory() -> int | None:
    """Measure bytes of host memory that can still be had; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")]
    try:
        most, used = (path.read_text().strip() for path in limits)
        if most != "max" and free is not None:
            free = min(free, int(most) - int(used))
    except (OSError, ValueError):
        pass
    return free
