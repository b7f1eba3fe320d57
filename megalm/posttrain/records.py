"""Records of instruction data: conversations, prompts with their completions, texts; from JSON lines, JSON and Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus.files import find_ending, open_bytes
from megalm.tokenizer.chat import check_messages

SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Who speaks, in the form that ShareGPT's exports have, and the role that it is."""
KINDS = 'messages (a list of {"role", "content"}), conversations (ShareGPT\'s {"from", "value"}), prompt with completion, or text'


@dataclass(frozen=True)
class Record:
    """One example, and where it stood. One of `messages`, (`prompt`, `completion`) and `text` is given."""

    place: str
    messages: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    """What each message's words count, where it is the assistant's; for `messages`."""
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


class BadRecord(ConfigError):
    """A record that nothing can be learned from, or that is no record; its message names the place."""


def read_records(path: str | Path) -> Iterator[Record | BadRecord]:
    """Read a file's records, in order; what is wrong with one is given in its place.

    Errors: ConfigError for a file that cannot be read at all.
    """
    for place, value in read_values(path):
        if isinstance(value, BadRecord):
            yield value
            continue
        try:
            yield parse_record(value, place)
        except ConfigError as error:
            yield BadRecord(str(error) if str(error).startswith(place) else f"{place}: {error}")


def read_values(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Read a file's records as JSON values, each with its place; a `BadRecord` stands for a line that is no JSON.

    Errors: as `read_records`
    """
    path = str(path)
    try:
        if find_ending(path) == ".parquet":
            yield from _read_parquet(path)
        else:
            yield from _read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: give a file of JSON lines (.jsonl), JSON or Parquet.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give its files.") from None
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    with open_bytes(path) as file:
        if find_ending(path) == ".json":
            try:
                values = json.load(file)
            except ValueError as error:
                raise ConfigError(f"{path}: not JSON: {error}.") from None
            if not isinstance(values, list):
                raise ConfigError(
                    f"{path}: holds one {type(values).__name__}: give a list of records, or a line for each."
                )
            yield from ((f"{path} record {number}", value) for number, value in enumerate(values, 1))
            return
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape"), 1):
            place = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                line.encode()
                yield place, json.loads(line)
            except UnicodeEncodeError:
                yield place, BadRecord(f"{place}: is not UTF-8.")
            except (ValueError, RecursionError) as error:
                yield place, BadRecord(f"{place}: not JSON: {error}.")


def _read_parquet(path: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path}: Parquet is read by pyarrow, which is not installed: pip install pyarrow.") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for value in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", value
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}.") from None


def parse_record(value: Any, place: str) -> Record:
    """Parse the record that a JSON value is. Errors: ConfigError that says what is wrong with it, and what is allowed."""
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: is {type(value).__name__}, not an object with {KINDS}.")
    given = [key for key in ("messages", "conversations", "prompt", "text") if value.get(key) is not None]
    if not given:
        raise ConfigError(f"{place}: has {', '.join(map(str, value)) or 'no field'}: needed is {KINDS}.")
    if "messages" in given or "conversations" in given:
        messages = value["messages"] if "messages" in given else name_turns(value["conversations"], place)
        return _conversation(messages, place)
    if "prompt" in given:
        return _completion(value["prompt"], value.get("completion"), place)
    text = value["text"]
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{place}: text is {text!r:.60}: it must be a text that is not empty.")
    return Record(place, text=text)


def name_turns(turns: Any, place: str) -> list[dict[str, Any]]:
    """Name the messages that ShareGPT's turns are. Errors: ConfigError for an unknown speaker"""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConfigError(f'{place}: conversations must be a list of {{"from", "value"}}.')
    messages = []
    for number, turn in enumerate(turns, 1):
        role = SHAREGPT.get(str(turn.get("from")))
        if role is None:
            raise ConfigError(f"{place}: turn {number} is from {turn.get('from')!r}: known are {', '.join(SHAREGPT)}.")
        messages.append({"role": role, "content": turn.get("value"), **{k: turn[k] for k in ("weight",) if k in turn}})
    return messages


def _conversation(messages: Any, place: str) -> Record:
    try:
        checked = check_messages(messages)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}.") from None
    weights = tuple(_weight(message, number, place) for number, message in enumerate(checked, 1))
    if not any(weights):
        raise ConfigError(f"{place}: nothing in it is to be learned: no message of the assistant has a weight above 0.")
    return Record(place, messages=tuple(checked), weights=weights)


def _weight(message: Mapping[str, Any], number: int, place: str) -> float:
    if message["role"] != "assistant":
        return 0.0
    weight = message.get("weight", message.get("loss_mask", 1.0))
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 100:
        raise ConfigError(f"{place}: message {number} has the weight {weight!r}: give a number from 0 to 100.")
    return float(weight)


def _completion(prompt: Any, completion: Any, place: str) -> Record:
    if isinstance(prompt, list) and isinstance(completion, list):
        record = _conversation([*prompt, *completion], place)
        weights = (0.0,) * len(prompt) + record.weights[len(prompt) :]
        if not any(weights):
            raise ConfigError(f"{place}: the completion holds no message of the assistant.")
        return Record(place, messages=record.messages, weights=weights)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ConfigError(f"{place}: prompt and completion must both be texts, or both lists of messages.")
    if not completion:
        raise ConfigError(f"{place}: the completion is empty: there is nothing to learn.")
    return Record(place, prompt=prompt, completion=completion)
