"""Norms over the residual stream."""

import torch

from megalm.architecture.blocks import NormSpec
from megalm.config import ParallelConfig
from megalm.parallel.mesh import Mesh
from megalm.parallel.norm import Norm


def make_norm(
    spec: NormSpec,
    mesh: Mesh,
    parallel: ParallelConfig,
    name: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Norm:
    """A norm over the residual stream's width."""
    return Norm(
        spec.kind,
        spec.size,
        name=name,
        eps=spec.eps,
        bias=spec.bias,
        axis=mesh.tensor,
        sequence_parallel=parallel.sequence and mesh.tensor.size > 1,
        device=device,
        dtype=dtype,
    )
