"""Random numbers for dropout: alike on ranks that hold the same activations, different where activations are sharded.

torch's default generators are the streams that tensor ranks share: `seed_ranks` seeds them alike along the tensor
axis and differently along all others. A dropout draws one number from the shared stream, and whether an element is
kept is a function of that number and of the element's place in the whole activation: a shard has its part of the mask
that the whole one would have, so that sequence parallelism changes no mask.
No state lives outside torch's generators: checkpoints save those, and torch.utils.checkpoint replays them.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megalm import ops
from megalm.parallel.mesh import Axis, Mesh


def seed_of(*parts: object) -> int:
    """A seed for a purpose, such as ("resume", seed, step): other parts give other numbers."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_ranks(seed: int, mesh: Mesh) -> None:
    """Seed torch's default generators: the same on all ranks of the tensor axis, different on any two others."""
    torch.manual_seed(seed_of("ranks", seed, mesh.data.rank, mesh.context.rank, mesh.pipeline.rank))


def apply_dropout(
    x: Tensor, probability: float, training: bool, axis: Axis, *, sharded: bool, residual: Tensor | None = None
) -> Tensor:
    """residual + dropout(x); x (and the residual) is this rank's part of the leading dim if `sharded`, else the whole.

    Shapes: x, residual [S/t or S, .., H] -> the same
    """
    if probability == 0.0 or not training:
        return x if residual is None else residual + x
    seed = int(torch.randint(1 << 62, ()))
    rows, ids = x.numel() // x.shape[-1], None
    if sharded and axis.size > 1:
        ids = torch.arange(axis.rank * rows, (axis.rank + 1) * rows, device=x.device)
    return ops.bias_dropout_add(x, residual, p=probability, seed=seed, row_ids=ids)
