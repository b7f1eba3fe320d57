"""Plain values (of yaml files, of the command line, of a checkpoint) made into the dataclasses, each field by its type."""

import difflib
import types
from collections.abc import Collection, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from megalm.config.errors import ConfigError
from megalm.config.names import find_our_key
from megalm.config.scalars import explain_number, read_any, read_number, read_truth, read_whole


@dataclass(frozen=True)
class Kind:
    """What a place in the configuration holds. `type` is without its None, which `optional` tells."""

    type: Any
    optional: bool = False
    default: Any = None
    choices: Collection[str] = ()

    @property
    def origin(self) -> Any:
        """list, tuple or dict of a type that has parts; Union of several types; None of a plain one."""
        origin = get_origin(self.type)
        return Union if origin is types.UnionType else origin

    @property
    def is_text(self) -> bool:
        """Takes its words as they are."""
        return self.type is str

    @property
    def is_group(self) -> bool:
        """Holds keys of its own."""
        return is_dataclass(self.type)

    @property
    def is_list(self) -> bool:
        """Holds several values of one kind."""
        return self.origin in (list, tuple)

    @property
    def is_mapping(self) -> bool:
        """Holds values by names that are no fields."""
        return self.origin is dict

    def part(self) -> "Kind":
        """Of a list, tuple or mapping: what each of its values is."""
        return classify_type(get_args(self.type)[1 if self.is_mapping else 0])

    def describe(self) -> str:
        """In words, with an example."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.is_group:
            return f"keys in braces ({', '.join(list(list_fields(self.type))[:3])}, ...)"
        if self.origin is tuple:
            count = len(get_args(self.type))
            example = f", such as [{', '.join(map(str, self.default))}]" if isinstance(self.default, tuple) else ""
            return f"a list of {count} values{example}"
        if self.is_list:
            part = self.part()
            return "a list of " + ("texts, such as [a,b]" if part.is_text else "numbers, such as [1,2]"
                                   if part.type in (int, float) else "groups of keys, such as [{...}]")  # fmt: skip
        if self.is_mapping:
            return "names with values in braces, such as {name: 1}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return words.get(self.type, "a whole number or a word" if self.origin is Union else "a value")


def classify_type(hint: Any, field: Field[Any] | None = None) -> Kind:
    """The kind that a type hint, and with it a field, stands for."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    optional = type(None) in members or hint is Any
    if optional and members:
        left = [member for member in members if member is not type(None)]
        hint = left[0] if len(left) == 1 else Union[tuple(left)]  # noqa: UP007 - made at run time
    if field is None:
        return Kind(hint, optional)
    default = field.default
    if default is NO_DEFAULT:
        default = field.default_factory() if field.default_factory is not NO_DEFAULT else None
    return Kind(hint, optional, default, field.metadata.get("choices", ()))


@cache
def list_fields(group: type) -> dict[str, Kind]:
    """List the fields of a dataclass."""
    hints = get_type_hints(group)
    return {field.name: classify_type(hints[field.name], field) for field in fields(group)}


def find_kind(root: type, path: Sequence[str]) -> Kind:
    """Find what the dotted path leads to.

    Errors: ConfigError for an unknown key, with the one that is probably meant.
    """
    kind = Kind(root)
    for number, part in enumerate(path):
        if kind.is_group:
            known = list_fields(kind.type)
            if part not in known:
                raise explain_unknown_key(root, path[:number], ".".join(path[number:]), known)
            kind = known[part]
        elif kind.is_list and part.isdecimal():
            kind = kind.part()
        elif kind.is_mapping:
            return kind.part()  # what is left is one name: names of sources have points
        elif kind.type is Any:
            return kind
        else:
            raise ConfigError(
                f"unknown key {'.'.join(path)!r}: {'.'.join(path[:number])} is {kind.describe()}, and has no keys."
            )
    return kind


def explain_unknown_key(root: type, parents: Sequence[str], name: str, known: dict[str, Kind]) -> ConfigError:
    """Explain the refusal of a key that nobody reads."""
    where = ".".join(parents)
    whole = f"{where}.{name}" if where else name
    listing = f"Keys of {where or 'the configuration'}: {', '.join(known)}."
    return ConfigError(f"unknown key {whole!r}.{_meant(root, name, known, where)} {listing}")


def _meant(root: type, name: str, known: dict[str, Kind], where: str) -> str:
    leaf = name.rpartition(".")[2]
    everywhere = sorted(list_paths(root), key=lambda path: (path.count("."), path))
    candidate = find_our_key(name) or find_our_key(leaf)
    if candidate is None:  # a letter too few or too many
        candidate = next(iter(difflib.get_close_matches(leaf, list(known), n=1, cutoff=0.85)), None)
    if candidate is None:
        candidate = next((path for path in everywhere if path == leaf or path.endswith(f".{leaf}")), None)
    if candidate is None:
        candidate = next(iter(difflib.get_close_matches(leaf, list(known), n=1)), None)
    if candidate is None:
        leaves = {path.rpartition(".")[2]: path for path in reversed(everywhere)}
        candidate = next((leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)), None)
    if candidate in known and where:
        candidate = f"{where}.{candidate}"
    return f" Did you mean {candidate!r}?" if candidate else ""


@cache
def list_paths(root: type) -> tuple[str, ...]:
    """List the dotted path of every field that is no group itself; what lies in lists is left out."""
    found: list[str] = []
    for name, kind in list_fields(root).items():
        found += [f"{name}.{inner}" for inner in list_paths(kind.type)] if kind.is_group else [name]
    return tuple(found)


def build(kind: Kind, value: Any, where: str = "", root: type | None = None) -> Any:
    """Build the value as its kind has it.

    where: its dotted path, for messages; root: what unknown keys are looked for in.
    Errors: ConfigError with the path, the value and what is allowed.
    """
    if value is None:
        if kind.optional:
            return None
        raise ConfigError(f"{where}=null: {kind.describe()} is needed.{_default(kind)}")
    if kind.is_group:
        return _build_group(kind, value, where, root or kind.type)
    if kind.is_list:
        return _build_list(kind, value, where, root)
    if kind.is_mapping:
        if not isinstance(value, dict):
            raise _refused(kind, value, where)
        return {str(name): build(kind.part(), inner, f"{where}.{name}", root) for name, inner in value.items()}
    if kind.type is Any:
        return _build_any(value)
    if isinstance(value, dict | list | tuple):
        raise _refused(kind, value, where)
    try:
        return _read(kind, value, where)
    except ValueError:
        raise _refused(kind, value, where) from None


def _read(kind: Kind, value: Any, where: str) -> Any:
    if kind.is_text:
        if isinstance(value, bool):
            value = str(value).lower()
        if not str(value).strip():
            raise _refused(kind, "", where)
        return str(value)
    if kind.origin is Union:
        try:
            return read_whole(value)
        except ValueError:
            return str(value)
    return {int: read_whole, float: read_number, bool: read_truth}[kind.type](value)


def _build_group(kind: Kind, value: Any, where: str, root: type) -> Any:
    known = list_fields(kind.type)
    if not isinstance(value, dict):
        first = next(iter(known))
        raise ConfigError(
            f"{where}={show(value)}: {where} is a group of keys: set one of them, such as {where}.{first}=... "
            f"Keys: {', '.join(known)}."
        )
    given = {}
    for name, inner in value.items():
        if name not in known:
            raise explain_unknown_key(root, where.split(".") if where else [], str(name), known)
        if inner == "???":  # what yaml files write where a value must be given
            continue
        given[name] = build(known[name], inner, f"{where}.{name}" if where else str(name), root)
    return kind.type(**given)


def _build_list(kind: Kind, value: Any, where: str, root: type | None) -> Any:
    if kind.part().is_group and isinstance(value, str) or isinstance(value, dict) and not kind.part().is_group:
        raise _refused(kind, value, where)
    items = list(value) if isinstance(value, list | tuple) else [value]  # one value where a list of one is meant
    if kind.origin is tuple and len(items) != len(get_args(kind.type)):
        raise _refused(kind, value, where)
    made = [build(kind.part(), item, f"{where}[{number}]", root) for number, item in enumerate(items)]
    return tuple(made) if kind.origin is tuple else made


def _build_any(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _build_any(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_build_any(inner) for inner in value]
    return read_any(value) if isinstance(value, str) else value


def _refused(kind: Kind, value: Any, where: str) -> ConfigError:
    if isinstance(value, str) and not value.strip():
        none = ", or null for none," if kind.optional else ""
        return ConfigError(f"{where} is empty: {kind.describe()}{none} is needed.{_default(kind)}")
    hint = explain_number(value) if kind.type in (int, float) and isinstance(value, str) else ""
    return ConfigError(f"{where}={show(value)}: {kind.describe()} is needed.{hint or _default(kind)}")


def _default(kind: Kind) -> str:
    if isinstance(kind.default, bool):
        return f" Leave it out for {str(kind.default).lower()}."
    if isinstance(kind.default, int | float | str) and kind.default not in ("", "???"):
        return f" Leave it out for {kind.default}."
    return ""


def show(value: Any) -> str:
    """A value as a person would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return str(value)
