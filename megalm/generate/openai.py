"""OpenAI's two endpoints in data: what a request asks for, and the objects that answer it.

Source: https://platform.openai.com/docs/api-reference (completions, chat/completions)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.errors import ConfigError
from megalm.generate.chat import Speaker
from megalm.generate.sampling import Sampling
from megalm.generate.text import WrittenText
from megalm.tokenizer.chat import check_messages

MOST_CHOICES = 128
"""Texts of one request."""
UNKNOWN = {
    "echo": (None, False),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}
"""What is not done here, with the values that ask for nothing: better refused than passed over."""


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    chat: bool
    prompts: list[list[int]]
    """Of each text to write."""
    sampling: list[Sampling]
    stop: list[str]
    stream: bool
    logprobs: bool
    prompt_tokens: int
    id: str
    model: str


def read_request(body: Any, speaker: Speaker, *, chat: bool) -> Asked:
    """Errors: ConfigError that names the field that is wrong"""
    if not isinstance(body, dict):
        raise ConfigError("the body must be a JSON object")
    for name, harmless in UNKNOWN.items():
        if body.get(name) not in harmless:
            raise ConfigError(f"{name} is not supported here; leave it out")
    default = max(1, min(256, speaker.window // 2))
    max_tokens = _number(body, "max_completion_tokens", _number(body, "max_tokens", default, 1), 1)
    temperature = _number(body, "temperature", 0.7, 0.0)
    top_p, top_k = _number(body, "top_p", 1.0, 0.0), _number(body, "top_k", 0, 0)
    seed, count = _number(body, "seed", time.time_ns() % 2**31, -(2**62)), _number(body, "n", 1, 1)
    if not isinstance(max_tokens, int) or not isinstance(count, int) or not isinstance(seed, int):
        raise ConfigError("max_tokens, n and seed must be whole numbers")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise ConfigError("stop must be a text or a list of texts that are not empty")
    if chat:
        prompts = [speaker.prompt_of(check_messages(body.get("messages")), max_tokens)]
        stop = [*stop, *speaker.template.stop]
    else:
        prompts = _prompts(body.get("prompt", ""), speaker)
    if len(prompts) * count > MOST_CHOICES:
        raise ConfigError(f"{len(prompts) * count} texts are asked for; at most {MOST_CHOICES}")
    sampling = [
        Sampling(max_tokens, float(temperature), int(top_k), float(top_p), seed + number) for number in range(count)
    ]
    for one in sampling:
        one.check()
    return Asked(
        chat=chat,
        prompts=[prompt for prompt in prompts for _ in sampling],
        sampling=sampling * len(prompts),
        stop=stop,
        stream=bool(body.get("stream")),
        logprobs=bool(body.get("logprobs")),
        prompt_tokens=sum(map(len, prompts)),
        id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex[:24],
        model=speaker.name,
    )


def _number(body: Mapping[str, Any], name: str, default: float, at_least: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value < 2**62:
        raise ConfigError(f"{name} is {value!r}; it must be a number of at least {at_least}")
    return value


def _prompts(given: Any, speaker: Speaker) -> list[list[int]]:
    many = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    prompts = []
    for one in many:
        if isinstance(one, str):
            prompts.append(speaker.encode(one))
        elif isinstance(one, list) and one and all(isinstance(i, int) and not isinstance(i, bool) for i in one):
            prompts.append(one)
        else:
            raise ConfigError("prompt must be a text, a list of token ids, or a list of such")
    return prompts


def make_answer(asked: Asked, written: list[WrittenText], speaker: Speaker) -> dict[str, Any]:
    """Make the whole answer to a request."""
    choices = []
    for index, one in enumerate(written):
        choice: dict[str, Any] = {"index": index, "finish_reason": one.written.reason}
        if asked.chat:
            choice["message"] = {"role": "assistant", "content": one.text.removeprefix(" ")}
        else:
            choice["text"] = one.text
        choice["logprobs"] = _logprobs(asked, one, speaker) if asked.logprobs else None
        choices.append(choice)
    completion = sum(len(one.written.tokens) for one in written)
    usage = {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": asked.prompt_tokens + completion,
    }
    return {**_head(asked, ""), "choices": choices, "usage": usage}


def make_piece(asked: Asked, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    """One event of a stream; `reason` on the last one of a text."""
    choice: dict[str, Any] = {"index": index, "finish_reason": reason}
    if asked.chat:
        choice["delta"] = {"content": text} if reason is None else {}
    else:
        choice["text"] = text
    return {**_head(asked, ".chunk"), "choices": [choice]}


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    name = f"chat.completion{kind}" if asked.chat else "text_completion"
    return {"id": asked.id, "object": name, "created": int(time.time()), "model": asked.model}


def _logprobs(asked: Asked, one: WrittenText, speaker: Speaker) -> dict[str, Any]:
    names = [speaker.tokenizer.decode([token]) for token in one.written.tokens]
    numbers = one.written.log_probabilities
    if asked.chat:
        return {"content": [{"token": t, "logprob": p} for t, p in zip(names, numbers, strict=True)]}
    return {"tokens": names, "token_logprobs": numbers}
