"""Which text of a record a document is: a key or column, a path into it, or a template of several.

A name is looked for as a key first, whatever characters it has, and as a path only where there is no such key:
`meta.text`, `messages.0.content` (-1: the last one), `messages.*.content` (all of a list, joined by line ends).
A template is text with names in braces; `{{` and `}}` stand for braces in it. A name that has braces itself stands in
quotes: `{"a{b}"}`.
"""

from __future__ import annotations

import contextlib
import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

SHOWN = 8  # keys that a message lists
NEEDS_QUOTES = re.compile('^"|[{}]')
_MISSING = object()


class Template(NamedTuple):
    """literals[0] names[0] literals[1] ... names[-1] literals[-1]"""

    literals: tuple[str, ...]
    names: tuple[str, ...]


@lru_cache(maxsize=64)
def parse_template(field: str) -> Template | None:
    """Parse the parts of a template; None for the name of a key, which is also what has braces that do not match."""
    literals, names = [""], []
    at = 0
    while at < len(field):
        if field[at : at + 2] in ("{{", "}}"):
            literals[-1] += field[at]
            at += 2
        elif field[at] == "{":
            name, at = _braced(field, at + 1)
            if not name:
                return None  # `{}`, a brace that does not close, or braces in braces
            names.append(name)
            literals.append("")
        elif field[at] == "}":
            return None
        else:
            literals[-1] += field[at]
            at += 1
    return Template(tuple(literals), tuple(names)) if names else None


def _braced(field: str, at: int) -> tuple[str, int]:
    """The name that begins here, and where what follows its brace begins; no name where it does not end."""
    if field[at : at + 1] == '"':
        with contextlib.suppress(ValueError):
            name, end = json.JSONDecoder().raw_decode(field, at)
            if field[end : end + 1] == "}":
                return name, end + 1
    match = re.compile(r"([^{}]+)}").match(field, at)
    return (match.group(1), match.end()) if match else ("", at)


def unescape_template(field: str) -> str:
    """In the text of a template, a backslash and an n stand for a line end; names are as they are."""
    template = parse_template(field)
    if template is None:
        return field
    literals = [_escaped(literal.replace("\\n", "\n")) for literal in template.literals]
    names = [f"{{{json.dumps(name) if re.search(NEEDS_QUOTES, name) else name}}}" for name in template.names]
    return "".join(part for pair in zip(literals, [*names, ""], strict=True) for part in pair)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def list_names(field: str) -> list[str]:
    """List the keys, columns or paths that it needs."""
    template = parse_template(field)
    return [field] if template is None else list(template.names)


def is_one_text(field: str) -> bool:
    """Whether it names a single text that could be replaced by another one: no template, no list."""
    return parse_template(field) is None and "*" not in field.split(".")


def find_column(name: str, columns: Any) -> str | None:
    """Find the column that a name is of, or a path into; None where there is none."""
    heads = (name[:end] for end in (len(name), *_dots(name)))
    return next((head for head in heads if head in columns), None)


def _dots(name: str) -> list[int]:
    """Where its dots are, the last one first."""
    return [match.start() for match in re.finditer(r"\.", name)][::-1]


def look_up_value(record: Any, name: str) -> Any:
    """What a key or path names; None where there is nothing."""
    found = _find(record, name)
    return None if found is _MISSING else found


def _find(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        if name in value:
            return value[name]
        for dot in _dots(name):
            if name[:dot] in value and (found := _find(value[name[:dot]], name[dot + 1 :])) is not _MISSING:
                return found
        return _MISSING
    if not isinstance(value, list):
        return _MISSING
    head, _, rest = name.partition(".")
    if head == "*":
        parts = [_find(item, rest) if rest else item for item in value]
        texts = all(isinstance(part, str) for part in parts)
        return "\n".join(parts) if texts and parts else _MISSING
    item = value[int(head)] if re.fullmatch(r"-?\d{1,9}", head) and -len(value) <= int(head) < len(value) else _MISSING
    return _find(item, rest) if rest else item


def replace_text(fields: Any, field: str, text: str) -> Any:
    """The fields with another text in this key or path; of a text alone, an object."""
    if not fields:
        return {"text": text}
    if isinstance(fields, list):
        head, _, rest = field.partition(".")
        return [
            (replace_text(item, rest, text) if rest else text) if at == int(head) % len(fields) else item
            for at, item in enumerate(fields)
        ]
    dots = [] if field in fields else _dots(field)
    dot = next((at for at in dots if _find(fields.get(field[:at]), field[at + 1 :]) is not _MISSING), -1)
    if dot < 0:
        return {**fields, field: text}
    return {**fields, field[:dot]: replace_text(fields[field[:dot]], field[dot + 1 :], text)}


def take_text(record: dict[str, Any], field: str) -> tuple[str, str]:
    """(text, "") that a record holds under this field, or ("", why there is none)."""
    value = record.get(field)
    template = None if field in record else parse_template(field)
    if template is None:
        if not isinstance(value, str):
            value, wrong = _text_at(record, field)
            if wrong:
                return "", wrong
        return value, explain_no_text(value)
    parts = [template.literals[0]]
    for name, literal in zip(template.names, template.literals[1:], strict=True):
        value, wrong = _text_at(record, name)
        if wrong:
            return "", wrong
        parts += [value, literal]
    text = "".join(parts)
    return text, explain_no_text(text)


def _text_at(record: dict[str, Any], name: str) -> tuple[str, str]:
    value = look_up_value(record, name)
    if isinstance(value, str):
        return value, ""
    if value is None:
        what = "missing, or null"
    elif isinstance(value, list):
        what = f"a list, not text (name one of it: {name}.0, or all, joined by line ends: {name}.*)"
    else:
        what = f"{type(value).__name__}, not text"
    hint = ""
    if value is None and ("{" in name or "}" in name):
        hint = "; in a template names stand in braces, and {{ and }} for braces"
    return "", f"field {name!r} is {what}; there are: {', '.join(_names_near(record, name, value))}{hint}"


def _names_near(record: dict[str, Any], name: str, value: Any) -> list[str]:
    """What a person may have meant: the names inside of what the path leads to, as far as it does."""
    inside, prefix = record, ""
    while column := find_column(name[len(prefix) :], inside):
        below = inside[column]
        if isinstance(below, list) and below and isinstance(below[0], dict):
            below, column = below[0], f"{column}.0"
        if not isinstance(below, dict) or not below:
            break
        inside, prefix = below, f"{prefix}{column}."
        if not name.startswith(prefix):
            break
    shown = [f"{prefix}{key}" for key in list(inside)[:SHOWN]]
    return shown + (["..."] if len(inside) > SHOWN else [])


def explain_no_text(text: str) -> str:
    """Explain why a string is not text that can be written, where it is none."""
    if text.isascii():
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # where a decoder left a byte as it was
            return "invalid UTF-8, or half of a surrogate pair"
        return "holds half of a surrogate pair, which is not text"
    return ""
