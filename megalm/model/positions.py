"""Where a token stands: rotary tables (RoPE) and linear biases (ALiBi)."""

import math

import torch
from torch import Tensor, nn

from megalm.config import ModelConfig
from megalm.data.batch import Batch
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import attach, replicated


def rotary_dim(config: ModelConfig) -> int:
    """Leading elements of each head that are rotated."""
    assert config.head_dim is not None
    return int(config.head_dim * config.rope_fraction)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angular frequency of each rotated pair, radians per position, [rotary_dim / 2] fp32.

    Source:  Su et al. 2021 (arXiv:2104.09864); Llama 3's stretching: low frequencies are divided by `factor`, high ones
             kept, those between blended by how many wavelengths fit into the original sequence.
    """
    size = rotary_dim(config)
    frequencies = config.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_seq_length * frequencies / (2 * math.pi)
        span = scaling.high_frequency_factor - scaling.low_frequency_factor
        keep = ((turns - scaling.low_frequency_factor) / span).clamp(0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / scaling.factor)
    return frequencies


def rotary_tables(config: ModelConfig, seq_length: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each [seq_length, rotary_dim / 2] fp32."""
    positions = torch.arange(seq_length, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """Slope of each head's linear bias, [num_heads] fp32; for a head count that is no power of two, as MPT does.

    Source:  Press et al. 2021 (arXiv:2108.12409).
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** -(torch.arange(1, power + 1, dtype=torch.float32) * max_bias / power)
    if power != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


def causal_alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask: -slope x distance, and -inf for keys after their query.

    Shapes:  slopes [A], query_positions [Q], key_positions [K] -> [A, Q, K]
    """
    distance = query_positions[:, None] - key_positions[None, :]
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf")).to(dtype)


class LearnedPositions(nn.Module):
    """A vector for each position, whole on every tensor rank.

    Shapes:  -> [S, 1 or B, H], or [S/t, 1 or B, H] with sequence_parallel;  weight [seq_length, H]
    Comm:    with sequence_parallel the weight's gradient is summed over the tensor axis
    """

    def __init__(
        self,
        seq_length: int,
        hidden: int,
        axis: Axis,
        *,
        name: str,
        sequence_parallel: bool,
        init_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis = axis if sequence_parallel else Axis(axis.name)
        self.weight = nn.Parameter(torch.empty(seq_length, hidden, device=device, dtype=dtype))
        slice_ = replicated(
            f"{name}.weight",
            (seq_length, hidden),
            axis,
            partial_gradient=sequence_parallel,
            decay=False,
            initial=init_std,
        )
        attach(self.weight, slice_)

    def forward(self, batch: Batch) -> Tensor:
        if batch.positions is None:
            rows = torch.arange(batch.tokens.shape[1], device=self.weight.device)[:, None]
        else:
            rows = batch.positions.t()
        share = rows.shape[0] // self.axis.size
        return nn.functional.embedding(rows.narrow(0, self.axis.rank * share, share), self.weight)
