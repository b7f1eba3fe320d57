"""Random numbers for dropout: alike on ranks that hold the same activations, different where activations are sharded.

torch's default generators are the streams that tensor ranks share: `seed_ranks` seeds them alike along the tensor
axis and differently along all others, and operations on replicated activations just use them. For sharded activations
`sharded_stream` draws one number from the shared stream (so that it moves on alike everywhere), and seeds the block
with it and the axis' rank.
No state lives outside torch's generators: checkpoints save those, and torch.utils.checkpoint replays them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.parallel.mesh import Axis, Mesh


def _seed_of(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_ranks(seed: int, mesh: Mesh) -> None:
    """Seed torch's default generators: the same on all ranks of the tensor axis, different on any two others."""
    torch.manual_seed(_seed_of("ranks", seed, mesh.data.rank, mesh.context.rank, mesh.pipeline.rank))


@contextmanager
def sharded_stream(axis: Axis, device: torch.device) -> Iterator[None]:
    """Default generators differ over the axis inside the block, and go on as if it had drawn one number after it."""
    if axis.size == 1:
        yield
        return
    shared = int(torch.randint(1 << 62, ()))
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(_seed_of("shard", shared, axis.rank))
        yield


def dropout(x: Tensor, probability: float, training: bool, axis: Axis, *, sharded: bool) -> Tensor:
    """Dropout whose mask differs over the axis if the activation is sharded over it, and agrees if it is replicated."""
    if probability == 0.0 or not training:
        return x
    if not sharded:
        return F.dropout(x, probability, True)
    with sharded_stream(axis, x.device):
        return F.dropout(x, probability, True)
