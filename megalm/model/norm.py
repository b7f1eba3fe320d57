"""Norms over the residual stream."""

import torch

from megalm.config import ModelConfig, ParallelConfig
from megalm.parallel.mesh import Mesh
from megalm.parallel.norm import Norm


def make_norm(
    config: ModelConfig,
    mesh: Mesh,
    parallel: ParallelConfig,
    name: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Norm:
    """A norm over the residual stream's width."""
    return Norm(
        config.norm,
        config.hidden_size,
        name=name,
        eps=config.norm_eps,
        bias=config.norm_bias,
        axis=mesh.tensor,
        sequence_parallel=parallel.sequence and mesh.tensor.size > 1,
        device=device,
        dtype=dtype,
    )
