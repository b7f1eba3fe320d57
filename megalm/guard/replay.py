"""The replay: going over the same steps again, bit by bit, to tell a hardware fault from a true one.

A step is a function of the weights, the optimizer, the data and the random state, all of which a snapshot holds. If the
same steps from the same snapshot give the same bad loss, the fault is in the run. If they do not, some machine computed
wrongly the first time; the checksums of each rank's weights, taken when the trouble was seen and again when the replay
arrives there, tell which one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megalm.parallel.collectives import all_gather
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import slice_of


@dataclass(frozen=True)
class StepRecord:
    """What is remembered of a step."""

    loss: float
    grad_norm: float
    first: int
    """Position in the stream before its batch."""
    last: int
    """Position after it."""
    refused: bool = False

    def same(self, loss: float, grad_norm: float) -> bool:
        """Bitwise equality; two NaNs are the same."""
        return (repr(self.loss), repr(self.grad_norm)) == (repr(loss), repr(grad_norm))


@dataclass(frozen=True)
class Replay:
    """A replay under way: what was seen when it was decided, for the comparison when it arrives there again."""

    until: int
    """Step that gave the alarm."""
    onset: int
    loss: list[str]
    """Loss, gradient norm and size of the update, as texts that hold every bit (`recover.list_measured`)."""
    fingerprints: list[int]
    """Of each rank's weights and optimizer state."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class History:
    """The last steps' records, by step; going back keeps them, for the replay to compare with."""

    def __init__(self, length: int = 1024):
        self.length = length
        self.records: dict[int, StepRecord] = {}

    def add(self, step: int, record: StepRecord) -> None:
        self.records[step] = record
        if len(self.records) > self.length:
            del self.records[min(self.records)]

    def get(self, step: int) -> StepRecord | None:
        return self.records.get(step)

    def first_position(self, step: int) -> int | None:
        """Where the batch of this step began, or that of the nearest later step that is known."""
        known = [s for s in self.records if s >= step]
        return self.records[min(known)].first if known else None


def take_fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """CRC-32 over the bytes of these tensors."""
    value = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        value = zlib.crc32(raw.numpy(), value)  # type: ignore[arg-type]
    return value


def gather_fingerprints(chunks: Sequence[Any], boxes: Sequence[Any], axis: Any, device: Any) -> list[int]:
    """Gather every rank's fingerprint of its weights and optimizer state.

    Comm: all-gather of one integer over `axis`.
    """
    own = take_fingerprint([p for chunk in chunks for p in chunk.parameters()] + [box.tensor for box in boxes])
    if axis.size == 1:
        return [own]
    return all_gather(torch.tensor([own], dtype=torch.int64, device=device), axis).tolist()


def list_replicated(chunks: Sequence[Any], axis: str) -> list[torch.Tensor]:
    """List weights and states that all ranks of the axis hold. What `fully_shard` has split has no copies."""
    return [
        tensor
        for chunk in chunks
        for tensor in (*chunk.parameters(), *chunk.buffers())
        if hasattr(tensor, "megalm_slice") and not isinstance(tensor, DTensor) and slice_of(tensor).reduce_over == axis
    ]


def find_odd_replicas(chunks: Sequence[Any], mesh: Mesh) -> list[int]:
    """World ranks, as far as this one can see, whose copies of weights or states differ from the others': each weight is
    compared over the ranks that hold it, which are others for experts.

    Comm: all-gather of one integer over data x context, and over the experts' replicas
    """
    odd: set[int] = set()
    for name in ("data_context", "expert_data"):
        axis = getattr(mesh, name)
        if axis.size == 1:
            continue
        own = torch.tensor([take_fingerprint(list_replicated(chunks, name))], dtype=torch.int64, device=mesh.device)
        prints = all_gather(own, axis).tolist()
        if len(set(prints)) > 1:
            odd.update(axis.ranks[place] for place in find_minority(prints))
    return sorted(odd)


def list_differing(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Ranks whose fingerprints differ."""
    return [rank for rank, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


def find_minority(fingerprints: Sequence[int]) -> list[int]:
    """Ranks that are alone against a majority; all of them where there is none."""
    counts = {value: list(fingerprints).count(value) for value in set(fingerprints)}
    most = max(counts.values())
    if most * 2 <= len(fingerprints):
        return list(range(len(fingerprints)))
    return [rank for rank, value in enumerate(fingerprints) if counts[value] != most]
