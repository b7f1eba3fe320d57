"""How a layer's attention knows where tokens stand: the rotation of queries and keys, resolved from the configuration."""

from dataclasses import dataclass

from megalm.config.model import ModelConfig, RopeScalingConfig


@dataclass(frozen=True)
class RopeSpec:
    """A rotation of queries and keys; layers with equal specs share their tables."""

    size: int
    """Leading elements of each head that are rotated."""
    theta: float
    interleaved: bool
    """Pairs are neighbours; else half of `size` apart."""
    kind: str
    """How frequencies are stretched; the settings of `model.rope_scaling` say more of this and what follows."""
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_seq_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    """Cosines and sines are multiplied by this."""
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]


def specify_rope(model: ModelConfig, size: int, *, window: bool) -> RopeSpec:
    """The rotation in layers with or without a window."""
    theta = model.window_rope_theta if window and model.window_rope_theta is not None else model.rope_theta
    scaled = model.window_rope_scaling or not window
    scaling = model.rope_scaling if scaled else RopeScalingConfig()
    return RopeSpec(
        size=size,
        theta=theta,
        interleaved=model.rope_interleaved,
        kind=scaling.kind,
        factor=scaling.factor,
        low_frequency_factor=scaling.low_frequency_factor,
        high_frequency_factor=scaling.high_frequency_factor,
        original_seq_length=scaling.original_seq_length,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        truncate=scaling.truncate,
        attention_factor=scaling.attention_factor,
        short_factors=tuple(scaling.short_factors),
        long_factors=tuple(scaling.long_factors),
    )
