"""Where a token stands: rotary tables (RoPE) and linear biases (ALiBi)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megalm.architecture.blocks import AttentionSpec
from megalm.architecture.layers import specify_layers
from megalm.architecture.positions import RopeSpec
from megalm.config import ModelConfig
from megalm.data.batch import Batch
from megalm.model.auxiliary import Auxiliary
from megalm.model.heads import locate_query_heads
from megalm.ops.attention import Mask
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Role, attach, make_replicated


def compute_rotary_frequencies(rope: RopeSpec, seq_length: int) -> Tensor:
    """Angular frequency of each rotated pair, radians per position, [rope.size / 2] fp32.

    seq_length: of the sequences that are computed with them; those that stretch by length look at it.
    Source:  Su et al. 2021 (arXiv:2104.09864)
    """
    exponents = torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size
    if rope.kind == "dynamic":
        # The base grows so that the slowest pair turns as far over the longer sequence as it did over the original one.
        growth = rope.factor * max(seq_length, rope.original_seq_length) / rope.original_seq_length - (rope.factor - 1)
        return (rope.theta * growth ** (rope.size / (rope.size - 2))) ** -exponents
    frequencies = rope.theta**-exponents
    return _STRETCHED[rope.kind](rope, frequencies, seq_length)


def _stretch_llama3(rope: RopeSpec, frequencies: Tensor, seq_length: int) -> Tensor:
    """Low frequencies are divided by `factor`, high ones kept, those between blended by how many wavelengths fit into the
    original sequence."""
    turns = rope.original_seq_length * frequencies / (2 * math.pi)
    span = rope.high_frequency_factor - rope.low_frequency_factor
    keep = ((turns - rope.low_frequency_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / rope.factor)


def _stretch_yarn(rope: RopeSpec, frequencies: Tensor, seq_length: int) -> Tensor:
    """As llama3's, but blended by the number of the pair. Source: Peng et al. 2023 (arXiv:2309.00071), sec. 3.2"""

    def pair(turns: float) -> float:
        """The pair that turns so many times in the original sequence."""
        return rope.size * math.log(rope.original_seq_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(rope.size // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return frequencies / rope.factor * stretched + frequencies * (1.0 - stretched)


def _stretch_each(rope: RopeSpec, frequencies: Tensor, seq_length: int) -> Tensor:
    """A factor for each pair, other ones beyond the original length. Source: Ding et al. 2024 (arXiv:2402.13753)"""
    factors = rope.long_factors if seq_length > rope.original_seq_length else rope.short_factors
    return frequencies / torch.tensor(factors, dtype=torch.float32)


_STRETCHED: dict[str, Callable[[RopeSpec, Tensor, int], Tensor]] = {
    "none": lambda rope, frequencies, seq_length: frequencies,
    "linear": lambda rope, frequencies, seq_length: frequencies / rope.factor,
    "llama3": _stretch_llama3,
    "yarn": _stretch_yarn,
    "longrope": _stretch_each,
}
"""How a kind of model.rope_scaling changes the frequencies."""


def compute_rotary_tables(
    rope: RopeSpec, positions: int, seq_length: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `positions` positions' angles, each [positions, rope.size / 2] fp32."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), compute_rotary_frequencies(rope, seq_length))
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos.to(device), sin.to(device)


def compute_alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """Slope of each head's linear bias, [num_heads] fp32; for a head count that is no power of two, as MPT does.

    Source:  Press et al. 2021 (arXiv:2108.12409).
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** -(torch.arange(1, power + 1, dtype=torch.float32) * max_bias / power)
    if power != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


@dataclass(frozen=True)
class Where:
    """What attention needs to know about positions; made once for a chunk's forward pass, shared by its layers."""

    rotary: Mapping[RopeSpec, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """cos and sin for each rotation: [S, 1, 1, size/2], or [S, B, 1, size/2] where each row has its own positions."""
    masks: Mapping[int | None, Mask] = field(default_factory=dict)
    """For each window (None: without one) what attention may see, where that is more than causality within it."""
    slopes: Tensor | None = None
    """ALiBi slopes of this rank's heads, [A/t]."""
    documents: Tensor | None = None
    """Under context parallelism, where no mask is made: the document of each token of the whole sequence, [B, S]."""
    auxiliary: Auxiliary | None = None
    """Takes the sums and losses that layers have beside their output."""

    def mask(self, window: int | None, q: Tensor, k: Tensor) -> Mask:
        """What queries [S, ...] may see of the keys [K, ...] within a window."""
        mask = self.masks.get(window)
        if mask is None:
            return Mask(q.shape[0], q.device, seen=k.shape[0] - q.shape[0], window=window, slopes=self.slopes)
        return mask.last(k.shape[0])


class Positions(nn.Module):
    """Rotary tables, ALiBi slopes and masks of one chunk of the model."""

    slopes: Tensor

    def __init__(self, config: ModelConfig, axis: Axis, device: torch.device | str | None) -> None:
        super().__init__()
        self.alibi = config.position == "alibi"
        self._masks: dict[tuple[int, int | None], Mask] = {}
        blocks = [block for layer in specify_layers(config) for block in layer.blocks]
        attention = [block for block in blocks if isinstance(block, AttentionSpec)]
        self.windows = list(dict.fromkeys(block.window for block in attention))
        self.ropes = list(dict.fromkeys(block.rope for block in attention if block.rope is not None))
        for number, rope in enumerate(self.ropes):
            for name, length in self._lengths(rope, config.seq_length).items():
                cos, sin = compute_rotary_tables(rope, config.seq_length, length, device)
                self.register_buffer(f"cos{number}{name}", cos, persistent=False)
                self.register_buffer(f"sin{number}{name}", sin, persistent=False)
        if self.alibi:
            slopes = compute_alibi_slopes(config.num_heads, config.alibi_max_bias)[
                locate_query_heads(attention[0], axis)
            ]
            self.register_buffer("slopes", slopes.to(device), persistent=False)

    def forward(self, batch: Batch, *, context: int = 1, seen: int = 0) -> Where:
        """For `batch`, whose first token follows `seen` cached ones, which its document_ids (if any) name too.

        context: ranks that the sequence is cut over; with several, attention itself applies causality, windows, slopes and
        documents, and no mask is made.
        """
        length = seen + batch.tokens.shape[1] * context
        slopes = self.slopes if self.alibi else None
        rotary = {rope: self._rotary(number, batch, seen, length) for number, rope in enumerate(self.ropes)}
        if context > 1:
            return Where(rotary, slopes=slopes, documents=batch.document_ids)
        return Where(rotary, {window: self._mask(batch, seen, window) for window in self.windows}, slopes)

    @staticmethod
    def _lengths(rope: RopeSpec, seq_length: int) -> dict[str, int]:
        """The sequence lengths that have tables of their own."""
        if rope.kind != "longrope":
            return {"": seq_length}
        return {"": rope.original_seq_length, "_long": rope.original_seq_length + 1}

    def _rotary(self, number: int, batch: Batch, seen: int, length: int) -> tuple[Tensor, Tensor]:
        rope = self.ropes[number]
        name = "_long" if rope.kind == "longrope" and length > rope.original_seq_length else ""
        cos, sin = self.get_buffer(f"cos{number}{name}"), self.get_buffer(f"sin{number}{name}")
        if batch.positions is None:
            rows = slice(seen, seen + batch.tokens.shape[1])
            return cos[rows, None, None], sin[rows, None, None]
        positions = batch.positions.t()
        return cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)

    def _mask(self, batch: Batch, seen: int, window: int | None) -> Mask:
        """The usual one, which no batch changes, is kept with what was drawn of it."""
        queries, device = batch.tokens.shape[1], batch.tokens.device
        slopes = self.slopes if self.alibi else None
        if seen or batch.document_ids is not None:
            return Mask(queries, device, seen=seen, window=window, documents=batch.document_ids, slopes=slopes)
        kept = self._masks.get((queries, window))
        if kept is None or kept.device != device:
            self._masks = {key: mask for key, mask in self._masks.items() if key[0] == queries}
            kept = self._masks[queries, window] = Mask(queries, device, window=window, slopes=slopes)
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
        slice_ = make_replicated(
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
