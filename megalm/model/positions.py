"""Where a token stands: rotary tables (RoPE) and linear biases (ALiBi)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.architecture.layers import layers_of
from megalm.architecture.shape import shape_of
from megalm.config import ModelConfig
from megalm.data.batch import Batch
from megalm.model.auxiliary import Auxiliary
from megalm.model.heads import local_query_heads
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Role, attach, replicated


def rotary_dim(config: ModelConfig) -> int:
    """Leading elements of each head that are rotated."""
    return int(shape_of(config).head_dim * config.rope_fraction)


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


@dataclass(frozen=True)
class Where:
    """What attention needs to know about positions; made once for a chunk's forward pass, shared by its layers."""

    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin: [S, 1, 1, rotary_dim/2], or [S, B, 1, rotary_dim/2] where each row has its own positions."""
    mask: Tensor | None = None
    """Additive or boolean, broadcast to [B, A/t, S, S + seen]; None where plain causal attention serves."""
    slopes: Tensor | None = None
    """ALiBi slopes of this rank's heads, [A/t]."""
    documents: Tensor | None = None
    """Under context parallelism, where no mask is made: the document of each token of the whole sequence, [B, S]."""
    auxiliary: Auxiliary | None = None
    """Takes the sums and losses that layers have beside their output."""


class Positions(nn.Module):
    """Rotary tables, ALiBi slopes and masks of one chunk of the model."""

    cos: Tensor
    sin: Tensor
    slopes: Tensor

    def __init__(self, config: ModelConfig, axis: Axis, device: torch.device | str | None) -> None:
        super().__init__()
        self.kind = config.position
        self._bias: Tensor | None = None
        if self.kind == "rope":
            cos, sin = rotary_tables(config, config.seq_length, device)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if self.kind == "alibi":
            slopes = alibi_slopes(config.num_heads, config.alibi_max_bias)[
                local_query_heads(layers_of(config)[0].attention, axis)
            ]
            self.register_buffer("slopes", slopes.to(device), persistent=False)

    def forward(self, batch: Batch, dtype: torch.dtype, *, context: bool = False, seen: int = 0) -> Where:
        """For `batch`, whose first token follows `seen` cached ones, which its document_ids (if any) name too.

        context: attention itself applies causality, slopes and documents over the context axis; no mask is made.
        """
        slopes = self.slopes if self.kind == "alibi" else None
        rotary = self._rotary(batch, seen) if self.kind == "rope" else None
        if context:
            return Where(rotary, None, slopes, batch.document_ids)
        return Where(rotary, self._mask(batch, dtype, seen), slopes)

    def _rotary(self, batch: Batch, seen: int) -> tuple[Tensor, Tensor]:
        if batch.positions is None:
            rows = slice(seen, seen + batch.tokens.shape[1])
            return self.cos[rows, None, None], self.sin[rows, None, None]
        positions = batch.positions.t()
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)

    def _mask(self, batch: Batch, dtype: torch.dtype, seen: int) -> Tensor | None:
        queries, device = batch.tokens.shape[1], batch.tokens.device
        bias = self._alibi(queries, seen, dtype) if self.kind == "alibi" else None
        if batch.document_ids is not None:
            ids = batch.document_ids
            same = (ids[:, None, seen:, None] == ids[:, None, None, :]).tril(seen)
            return same if bias is None else bias.masked_fill(~same, float("-inf"))
        if bias is None and seen:
            keys = torch.arange(seen + queries, device=device)
            return keys[seen:, None] >= keys
        return bias

    def _alibi(self, queries: int, seen: int, dtype: torch.dtype) -> Tensor:
        """The bias of the last `queries` of seen + queries positions; the usual one is kept."""
        kept = self._bias
        if kept is None or seen or kept.shape[-1] != queries or kept.dtype != dtype:
            keys = torch.arange(seen + queries, device=self.slopes.device)
            kept = causal_alibi_bias(self.slopes, keys[seen:], keys, dtype)
            if not seen:
                self._bias = kept
        return kept


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
            role=Role.EMBEDDING,
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
