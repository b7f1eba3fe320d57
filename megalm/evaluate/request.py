"""What a model is asked: ids, of which the last ones are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megalm.config.errors import ConfigError
from megalm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """Ids of which the last `count` are scored, each by all that stand before it."""

    ids: tuple[int, ...]
    count: int


class Score(NamedTuple):
    """What a model says of a request."""

    log_probability: float
    """Natural logarithm, the sum over the scored tokens, in fp32 a token."""
    tokens: int
    likeliest: bool
    """Whether each scored token is the one that the model would have chosen."""

    @property
    def per_token(self) -> float:
        """The mean over the scored tokens; of none the least there is, so that nothing chooses it."""
        return self.log_probability / self.tokens if self.tokens else -math.inf


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before the first token of a text: the begin token, else the end token. ConfigError where it has neither."""
    token = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if token is None:
        raise ConfigError(
            f"{tokenizer.path}: the tokenizer has neither a begin nor an end token, which evaluation puts before a text; "
            "name one in its tokenizer_config.json"
        )
    return token


def cut_left(context: Sequence[int], continuation: Sequence[int], limit: int, what: str) -> Request:
    """A request of at most `limit` ids: the context loses its beginning. ConfigError where the continuation alone is longer."""
    if len(continuation) >= limit:
        raise ConfigError(
            f"{what}: the continuation has {len(continuation)} tokens and the model reads {limit - 1} before the last one; "
            "evaluate a model with a longer sequence, or leave the task out"
        )
    ids = (*context, *continuation)
    return Request(tuple(ids[-limit:]), len(continuation))


def roll(ids: Sequence[int], prefix: int, length: int) -> list[Request]:
    """A whole text in windows that score each token once: the first begins with `prefix`, the last reaches back so that it
    is full. `length`: most tokens that the model reads.
    """
    if not ids:
        return []
    first = min(length, len(ids))
    windows = [Request((prefix, *ids[:first]), first)]
    done = first
    while done < len(ids):
        count = min(len(ids) - done, length)
        end = done + count
        windows.append(Request(tuple(ids[end - length - 1 : end]), count))
        done = end
    return windows
