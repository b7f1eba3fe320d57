"""Records of preferences: a prompt with a better and a worse answer, as two records that fine-tuning would know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.posttrain.records import BadRecord, Record, name_turns, parse_record, read_values


@dataclass(frozen=True)
class PairRecord:
    """Two answers to one prompt. Each is a record of its own, of which the answer alone is a target."""

    place: str
    chosen: Record
    rejected: Record
    margin: float = 0.0
    """By how much the better answer was judged to be better, in units of reward."""


def is_pair(value: Any) -> bool:
    """Whether a JSON value means to be a pair."""
    return isinstance(value, dict) and ("chosen" in value or "rejected" in value)


def read_pairs(path: str | Path) -> Iterator[PairRecord | BadRecord]:
    """Read a file's pairs, in order; what is wrong with one is given in its place. Errors: as `read_values`"""
    for place, value in read_values(path):
        try:
            yield value if isinstance(value, BadRecord) else parse_pair_record(value, place)
        except ConfigError as error:
            yield BadRecord(str(error) if str(error).startswith(place) else f"{place}: {error}")


def parse_pair_record(value: Any, place: str) -> PairRecord:
    """The pair that a JSON value is: prompt, chosen and rejected, texts or lists of messages; or two conversations, which begin
    alike. ShareGPT's turns are messages too.

    Errors: ConfigError
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: is {type(value).__name__}, not an object with prompt, chosen and rejected.")
    missing = [key for key in ("chosen", "rejected") if value.get(key) is None]
    if missing:
        raise ConfigError(f"{place}: has no {missing[0]} answer: a pair has prompt, chosen and rejected.")
    prompt, sides = value.get("prompt"), [_say_as_messages(value[key], place) for key in ("chosen", "rejected")]
    if isinstance(sides[0], list) and isinstance(sides[1], list):
        prompt, sides = _part(prompt, sides[0], sides[1], place)
    elif prompt is None:
        raise ConfigError(f"{place}: two answers as texts need a prompt.")
    if sides[0] == sides[1]:
        raise ConfigError(f"{place}: chosen and rejected are the same: there is nothing to prefer.")
    records = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        try:
            records.append(parse_record({"prompt": prompt, "completion": side}, place))
        except ConfigError as error:
            raise ConfigError(f"{place}: {name}: {str(error).removeprefix(f'{place}: ')}") from None
    chosen, rejected = records
    return PairRecord(place, chosen, rejected, _margin(value.get("margin"), place))


def _say_as_messages(side: Any, place: str) -> Any:
    if isinstance(side, list) and side and all(isinstance(turn, dict) and "from" in turn for turn in side):
        return name_turns(side, place)
    return side if not isinstance(side, dict) else [side]


def _part(prompt: Any, chosen: list[Any], rejected: list[Any], place: str) -> tuple[Any, list[Any]]:
    """Prompt and answers of two lists of messages; without a prompt it is what both begin with."""
    if prompt is not None:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        whole = [side[: len(prompt)] == prompt for side in (chosen, rejected)]
        return prompt, [side[len(prompt) :] if all(whole) else side for side in (chosen, rejected)]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise ConfigError(f"{place}: chosen and rejected are the same: there is nothing to prefer.")
    if shared == 0:
        raise ConfigError(
            f"{place}: the two conversations begin with different messages: they answer no common prompt."
        )
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _margin(value: Any, place: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(
            f"{place}: margin is {value!r}: give a number, by how much the chosen answer is the better one."
        )
    return float(value)
