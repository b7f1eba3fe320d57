"""How the next token is chosen: settings, and one draw from a model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.config.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How one text is written."""

    max_tokens: int = 160
    """Most tokens to write."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Only among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only among the likeliest tokens that hold this probability (Holtzman et al. 2020)."""
    seed: int = 0
    """The same seed writes the same text, alone or among others, on every tensor rank."""

    def check(self) -> None:
        """Errors: ConfigError for a setting that no text can be drawn with."""
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must fit into 64 bits")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ConfigError for a setting that no text can be drawn with."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature} must be at least 0 (always the likeliest token) and finite")
    if top_k < 0:
        raise ConfigError(f"top-k={top_k} must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top-p={top_p} must be above 0 and at most 1 (all tokens)")


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token drawn from logits fp32 [V]. The draw is made on the CPU, so that every device and rank draws the
    same."""
    logits = logits.cpu()
    if not logits.max().isfinite():
        raise ConfigError(
            f"the model's largest logit is {float(logits.max())}: its weights are damaged, or its training diverged; nothing "
            "can be written with it"
        )
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits / temperature
    order = logits.argsort(descending=True, stable=True)
    probabilities = logits[order].softmax(0)
    if top_k > 0:
        probabilities[top_k:] = 0
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= top_p] = 0
        probabilities[0] = max(float(probabilities[0]), torch.finfo(torch.float32).tiny)  # top_p 0 means the likeliest
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
