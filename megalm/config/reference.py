"""What every key means: its docstring, kind, default, range and effect, read from the dataclasses that declare it."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from textwrap import dedent, wrap
from typing import Any, get_args

from megalm.config.effects import Effect
from megalm.config.errors import ConfigError
from megalm.config.fields import MISSING, Range
from megalm.config.groups import list_groups
from megalm.config.root import Config
from megalm.config.typed import Kind, find_kind, list_fields, show


@dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str
    """Dotted path; items of a list of groups are written with [n]."""
    text: str
    """What it means."""
    kind: str
    """What it holds, in words."""
    default: str
    """As it would be typed."""
    allowed: str | None
    """The range of its numbers."""
    effect: Effect | None
    """What another value does to a run that goes on."""


def list_keys() -> list[Key]:
    """List every key that can be set, in the order of the dataclasses."""
    return list(_keys(Config, "", None))


def describe(name: str) -> str:
    """Describe the answer to `--help KEY`: a key, or all keys of a group.

    Errors: ConfigError for an unknown key, with the one that is probably meant.
    """
    keys = {key.name: key for key in list_keys()}
    if name in keys:
        return _whole(keys[name])
    within = [key for key in keys.values() if key.name.startswith((f"{name}.", f"{name}[n]."))]
    if not within:
        find_kind(Config, name.split("."))  # says what is meant instead
        raise ConfigError(f"{name}: items of a list or mapping have no description of their own.")
    choices = list_groups().get(name, [])
    head = [f"{name}={'|'.join(choices)}", ""] if choices else []
    width = max(len(key.name) for key in within)
    return "\n".join([*head, *(f"{key.name:<{width}}  {key.default:<12}  {_first_line(key.text)}" for key in within)])


def write_reference_page() -> str:
    """All keys as a page in Markdown: what docs/reference.md holds."""
    lines = [
        "# Every key",
        "",
        "Made from the dataclasses in `megalm/config` by `megalm inspect keys --markdown`; a test holds it to them. The last",
        "column says what changes in a run that goes on with another value ([checkpoints](checkpoints.md)).",
    ]
    section = None
    for key in list_keys():
        group = key.name.partition(".")[0] if "." in key.name else "the run as a whole"
        if group != section:
            section = group
            lines += [
                "",
                f"## {group}",
                "",
                "| key | default | meaning | holds | another value |",
                "|---|---|---|---|---|",
            ]
        holds = key.kind + (f"; {key.allowed}" if key.allowed else "")
        effect = key.effect.value if key.effect else ""
        cells = (f"`{key.name}`", f"`{key.default}`", key.text, holds, effect)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _keys(group: type, prefix: str, inherited: Effect | None) -> Iterator[Key]:
    texts, kinds = _texts(group), list_fields(group)
    for field in fields(group):
        effect = next((word for word in get_args(field.type)[1:] if isinstance(word, Effect)), inherited)
        kind, name = kinds[field.name], f"{prefix}{field.name}"
        inner = kind.part() if kind.is_list or kind.is_mapping else None
        if kind.is_group:
            yield from _keys(kind.type, f"{name}.", effect)
            continue
        yield _key(name, field, kind, texts.get(field.name, ""), effect)
        if inner is not None and inner.is_group:
            yield from _keys(inner.type, f"{name}[n]." if kind.is_list else f"{name}.NAME.", effect)


def _key(name: str, field: Field[Any], kind: Kind, text: str, effect: Effect | None) -> Key:
    allowed: Range | None = field.metadata.get("range")
    return Key(name, text, kind.describe(), _default(field), str(allowed) if allowed else None, effect)


def _default(field: Field[Any]) -> str:
    value = field.default
    if value is NO_DEFAULT:
        value = field.default_factory() if field.default_factory is not NO_DEFAULT else None
    if isinstance(value, str) and value == MISSING:
        return "must be given"
    if is_dataclass(value) or isinstance(value, list) and value and is_dataclass(value[0]):
        return "see below"
    return show(value) if value != "" else '""'


@cache
def _texts(group: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, in one line."""
    body = ast.parse(dedent(inspect.getsource(group))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    for base in group.__bases__:
        if is_dataclass(base):
            found = {**_texts(base), **found}
    return found


def _whole(key: Key) -> str:
    lines = [f"{key.name}={key.default}", "", *wrap(key.text, 100), "", f"holds: {key.kind}"]
    lines += [f"numbers: {key.allowed}"] if key.allowed else []
    lines += [f"in a run that goes on with another value: {key.effect.value}"] if key.effect else []
    return "\n".join(lines)


def _first_line(text: str) -> str:
    return wrap(text, 90, max_lines=1, placeholder=" ...")[0] if text else ""
