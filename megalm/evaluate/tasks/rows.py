"""Items from jsonl rows in the form of the gauntlet and of CORE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.evaluate.instructions import describe_rules
from megalm.evaluate.item import Item

TYPES = {
    "multiple_choice": "choice",
    "schema": "schema",
    "language_modeling": "cloze",
    "generation_task_with_answers": "generate",
    "question_answering": "generate",
    "instruction_following": "instruct",
    "code_evaluation": "code",
    "text": "text",
}
"""`icl_task_type` of a suite -> kind of item. `text` is ours: a row {"text": ...} whose every token counts."""
FIELDS = {
    "choice": '{"query": text, "choices": [text, ...], "gold": number}',
    "schema": '{"context_options": [text, ...], "continuation": text, "gold": number}',
    "cloze": '{"context": text, "continuation": text}',
    "generate": '{"context": text, "answer": text, "aliases": [text, ...]}',
    "text": '{"text": text}',
    "instruct": '{"prompt": text, "instruction_id_list": [text, ...], "kwargs": [object, ...]}',
    "code": '{"prompt": text, "test": text, "entry_point": text}',
}
"""A row of each kind."""


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line N", row) of a jsonl file. Errors: ConfigError that names the line"""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: holds {type(row).__name__}, a row is an object such as {FIELDS['choice']}")
        yield where, row


def read_items(path: Path, kind: str) -> tuple[Item, ...]:
    """Read the items of a jsonl file. Errors: ConfigError that names line and field, or that there are none"""
    items = tuple(make_item(row, kind, where) for where, row in read_rows(path))
    if not items:
        raise ConfigError(f"{path}: no items; a line each, as {FIELDS[kind]}")
    return items


def guess_kind(row: Mapping[str, Any]) -> str | None:
    """The kind of a row by the fields that it has."""
    if "choices" in row:
        return "choice"
    if "context_options" in row:
        return "schema"
    if "continuation" in row:
        return "cloze"
    if "prompt" in row and "test" in row:
        return "code"
    if "instruction_id_list" in row:
        return "instruct"
    if "answer" in row:
        return "generate"
    return "text" if "text" in row else None


def make_item(row: Mapping[str, Any], kind: str, where: str) -> Item:
    """One row as an item. Errors: ConfigError that names `where` and the field"""

    def text(name: str) -> str:
        value = row.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {name!r} is {value!r}, it must be a text: {FIELDS[kind]}")
        return value

    def texts(name: str) -> tuple[str, ...]:
        value = row.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise ConfigError(f"{where}: {name!r} is {value!r}, it must be a list of texts: {FIELDS[kind]}")
        return tuple(value)

    def gold(count: int) -> tuple[int, ...]:
        value = row.get("gold")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise ConfigError(f"{where}: 'gold' is {value!r}, it must be a number from 0 to {count - 1}")
        return (value,)

    if kind == "choice":
        choices = texts("choices")
        return Item(kind, (text("query"),), choices, gold(len(choices)), row)
    if kind == "schema":
        contexts = texts("context_options")
        return Item(kind, contexts, (text("continuation"),), gold(len(contexts)), row)
    if kind == "cloze":
        continuation = text("continuation")
        if not continuation.strip():
            raise ConfigError(f"{where}: 'continuation' is {continuation!r}: there is nothing to predict")
        return Item(kind, (text("context"),), (continuation,), (0,), row)
    if kind == "text":
        return Item(kind, (), (text("text"),), (0,), row)
    if kind == "code":
        name = row.get("entry_point", "")
        if not isinstance(name, str) or not (name.isidentifier() or not name):
            raise ConfigError(f"{where}: 'entry_point' is {name!r}, it must be the name of the function that is tested")
        check = f"{text('test')}\n" + (f"check({name})\n" if name else "")
        return Item(kind, (text("prompt"),), (check,), (0,), row, shown=str(row.get("canonical_solution", "")))
    if kind == "instruct":
        names, settings = texts("instruction_id_list"), row.get("kwargs")
        if (
            not isinstance(settings, list)
            or len(settings) != len(names)
            or not all(isinstance(s, dict) for s in settings)
        ):
            raise ConfigError(f"{where}: 'kwargs' is {settings!r}, it must be a list of objects, one for each rule")
        return Item(kind, (text("prompt"),), describe_rules(list(names), settings), (0,), row)
    answers = (text("answer"), *(texts("aliases") if row.get("aliases") else ()))
    return Item("generate", (text("context"),), tuple(dict.fromkeys(answers)), (0,), row)
