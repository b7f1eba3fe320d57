"""Drawing the next token of many texts at once, each by its own random numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megalm.data.mixing import mix

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def draw_numbers(keys: np.ndarray, place: int) -> np.ndarray:
    """A number in [0, 1) for each text and the place of its next token: a function of both, so that no text's numbers depend on
    what is written beside it, on which rank, or on a restart.

    Shapes: keys uint64 [N] -> float64 [N]
    """
    bits = mix(mix(keys) + np.uint64(place * _GOLDEN & _MASK))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_tokens(logits: Tensor, numbers: np.ndarray, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(token, its log-probability, the entropy of the distribution it is drawn from in nats), of each text.

    The token is the first whose cumulated probability exceeds the text's number. Nothing is cut off the distribution: what the
    trainer computes is the probability by which a token was drawn. Temperature 0 takes the likeliest token, whose
    log-probability is told at temperature 1.

    Shapes: logits fp32 [N, V]; numbers [N] -> int64 [N], fp32 [N], fp32 [N]
    Errors: ValueError for logits that are not finite
    """
    scores = (logits / temperature if temperature not in (0.0, 1.0) else logits).log_softmax(-1)
    probabilities = scores.exp()
    entropy = -(probabilities * scores.clamp_min(-1e4)).sum(-1)
    if not bool(entropy.isfinite().all()):
        raise ValueError("a logit is not finite")
    if temperature == 0.0:
        tokens = scores.argmax(-1)
    else:
        cumulated = probabilities.double().cumsum(-1)
        wanted = torch.from_numpy(numbers).to(cumulated.device)[:, None] * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, wanted, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return tokens, scores.gather(-1, tokens[:, None]).squeeze(-1), entropy
