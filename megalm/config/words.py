"""The words of a command line, `key=value`: what each sets, its value taken apart as the field's type asks.

A text field takes what stands behind the first `=` as it is: 12e4567, exp=1, a#b and 日本 are names like any other. Only a
list's brackets, a mapping's braces and quotation marks around a whole value mean something; where a text begins and ends
with them by itself, the word is refused with the quoted form to write instead.
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.names import find_our_key
from megalm.config.root import Config
from megalm.config.typed import Kind, explain_unknown_key, find_kind, list_fields, list_paths, show

_WORD = re.compile(r"(?P<sign>\+{0,2}|~)(?P<key>[^=\s]*)\s*=\s*(?P<value>.*)", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_][\w-]*([./][\w-]+)*")
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # what Hydra's command line lets stand behind a backslash
_RENAMED = {"checkpoint.async": "checkpoint.asynchronous"}  # Python keeps the word for itself
_PAIRS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Setting:
    """One value for one key."""

    key: str
    value: Any
    """Words, lists and mappings of words, and None; their types are the fields' business."""

    @property
    def path(self) -> list[str]:
        """The parts of the key."""
        return self.key.split(".")


@dataclass(frozen=True)
class Words:
    """What a command line asks for."""

    choices: dict[str, str]
    """Group -> name of a yaml file of it."""
    model_file: Path | None
    """A model described in a file of the user's own."""
    files: dict[str, Path]
    """Group -> a yaml file of the user's own, given by its path."""
    settings: list[Setting]
    """Single values, in their order."""


def read_words(words: Sequence[str], groups: dict[str, list[str]]) -> Words:
    """Take a command line apart.

    groups: the choices of each group.
    Errors: ConfigError for a word that sets nothing, an unknown key or choice, and values that can be read in two ways.
    """
    choices: dict[str, str] = {}
    model_file: Path | None = None
    files: dict[str, Path] = {}
    settings: list[Setting] = []
    for place, word in enumerate(words):
        sign, key, value = _split(word, words[place + 1 : place + 2], groups)
        group = key.partition("/")[0]
        if group in groups and not value.startswith("{"):
            if sign == "~":
                raise ConfigError(f"{word}: a group cannot be left out. Choose one: {', '.join(groups[group])}.")
            name = _unquoted(key[len(group) + 1 :] + "/" + value if "/" in key else value, word)
            if group == "model" and name.endswith((".yaml", ".yml")):
                name, model_file = name, Path(name)
            elif group == "experiment" and name == "null":
                continue
            elif name.endswith((".yaml", ".yml")):
                files[group] = _existing(group, name)
                choices.pop(group, None)
                continue
            elif name not in groups[group]:
                raise _no_such_choice(group, name, groups)
            if group in ("model", "experiment") and choices.get(group, name) != name:
                raise ConfigError(f"{group}={choices[group]} and {group}={name}: give one of them.")
            choices[group] = name
            files.pop(group, None)
            continue
        if sign == "~":
            raise ConfigError(f"{word}: a key cannot be taken away. Set {key}=null or {key}=[] where it may be empty.")
        key = _RENAMED.get(key, key)
        kind = find_kind(Config, key.split("."))
        settings.append(Setting(key, parse(kind, value, key)))
    if model_file is not None:
        choices.pop("model")
    return Words(choices, model_file, files, settings)


def _existing(group: str, name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"{group}={name}: there is no such file. Give the path of a yaml file, or a name without .yaml."
        )
    return path


def take_out_search(words: Sequence[str]) -> tuple[list[str], bool]:
    """Words without `parallel=auto`, and whether it was among them: it is no choice of a file, but asks the planner for one."""
    rest = [word for word in words if word.strip().lstrip("+") != "parallel=auto"]
    return rest, len(rest) < len(words)


def _split(word: str, following: Sequence[str], groups: dict[str, list[str]]) -> tuple[str, str, str]:
    """Sign, key and value of a word. The word behind it and the groups only serve to say what is meant by a wrong one."""
    found = _WORD.fullmatch(word.strip())
    if found and _KEY.fullmatch(found["key"]):
        return found["sign"], found["key"], found["value"].strip()
    if word.startswith("~"):
        if word[1:] in groups:
            raise ConfigError(f"{word}: a group cannot be left out. Choose one: {', '.join(groups[word[1:]])}.")
        raise ConfigError(f"{word}: a key cannot be taken away. Set it to null, or to [] where it is a list.")
    hint = _hint(word, following, groups)
    raise ConfigError(f"cannot read {word!r}: write key=value, for example train.steps=100 or +model=tiny.{hint}")


def _hint(word: str, following: Sequence[str], groups: dict[str, list[str]]) -> str:
    if word in ("-m", "--multirun"):
        return " It stands first: megalm train -m +model=tiny optim.lr=1e-3,2e-3."
    if word in groups.get("model", []):
        return f" Did you mean +model={word}?"
    name, separator, value = re.sub(r"^[-+]+", "", word.strip()).partition("=")
    if not separator:
        name, separator, value = name.partition(":")
    value = value.strip() or next((other for other in following if "=" not in other), "...")
    if difflib.get_close_matches(name.strip(), ["model"], cutoff=0.75):
        return f" Did you mean +model={value}?"
    ours = _our_key(name.strip())
    setting = f"{ours}={value}" if ours and "=" not in ours else ours
    return f" Did you mean {setting}?" if setting else ""


def _our_key(name: str) -> str | None:
    """The key that a name means: one of ours, another trainer's, or the last part of one of ours."""
    name = name.replace("-", "_")
    if name in _RENAMED or _is_key(name):
        return name
    ends = sorted((p for p in list_paths(Config) if p.endswith(f".{name}")), key=lambda path: (path.count("."), path))
    return find_our_key(name) or next(iter(ends), None)


def _is_key(name: str) -> bool:
    try:
        find_kind(Config, name.split("."))
    except ConfigError:
        return False
    return bool(name)


def _no_such_choice(group: str, name: str, groups: dict[str, list[str]]) -> ConfigError:
    near = difflib.get_close_matches(name, groups[group], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    searched = ", or auto, by which the planner chooses" if group == "parallel" else ""
    return ConfigError(
        f"{group}={name}: there is no such {group}.{hint} Choices: {', '.join(groups[group])}{searched}."
    )


def parse(kind: Kind, value: str, key: str) -> Any:
    """Parse a value of the command line as words, lists and mappings of words, by what its field holds.

    Errors: ConfigError for one that could be meant in two ways, with both forms.
    """
    value = value.strip()
    if value.lower() == "null":
        if kind.is_text and not kind.optional and not kind.choices:
            raise _two_ways(key, value, "null stands for nothing, and a text is needed here")
        return None
    if kind.is_list:
        return _parse_list(kind, value, key)
    if kind.is_mapping or kind.is_group:
        return _parse_mapping(kind, value, key) if _wrapped(value, "{") else value
    if kind.type is Any and _wrapped(value, "["):
        return [parse(kind, item, key) for item in _items(value, key)]
    if kind.type is Any and _wrapped(value, "{"):
        return _parse_mapping(kind, value, key)
    if kind.is_text:
        return _parse_text(kind, value, key)
    return _unquoted(value, f"{key}={value}")


def _parse_text(kind: Kind, value: str, key: str) -> str:
    if value[:1] in ("'", '"'):
        return _unquoted(value, f"{key}={value}", key)
    if _wrapped(value, "[") or _wrapped(value, "{"):
        raise _two_ways(key, value, "brackets mean a list, and one text is needed here")
    if value in ("None", "none") and kind.optional:
        raise _two_ways(key, value, f"for none write {key}=null")
    return _ESCAPED.sub(r"\1", value)


def _parse_list(kind: Kind, value: str, key: str) -> Any:
    part = kind.part()
    if value.startswith("[") and not _wrapped(value, "["):
        closed = f"{value}]" if value.count("[") > value.count("]") else f"[{value}]"
        raise ConfigError(
            f"{key}={value}: a bracket is opened, and none closes the list: write {quote_setting(key, closed)}."
        )
    if _wrapped(value, "["):
        return [parse(part, item, key) for item in _items(value, key)]
    if part.is_text and value in ("None", "none"):
        raise ConfigError(f"{key}={value}: for no values write {key}=[].")
    if value[:1] not in ("'", '"') and len(_parts(value)) > 1:
        text = ""
        if part.is_text:
            text = f", or for one text with a comma {quote_word(key, value, in_list=True)}"
        raise ConfigError(
            f"{key}={value}: several values stand in brackets: {quote_setting(key, f'[{_inside(value)}]')}{text}."
        )
    if not value:
        raise ConfigError(f"{key}= is empty: write {kind.describe()}; [] for none.")
    return [parse(part, value, key)] if part.is_text or part.is_group else value


def _inside(value: str) -> str:
    """Values without the brackets of another language."""
    return value[1:-1] if _wrapped(value, "(") else value


def _parse_mapping(kind: Kind, value: str, key: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in _items(value, key):
        name, inner = _name_and_value(item, key)
        if name in found:
            raise ConfigError(f"{key}={value}: {name} stands twice.")
        where = f"{key}.{name}" if key else name
        if kind.is_group and name not in list_fields(kind.type):
            raise explain_unknown_key(Config, key.split("."), name, list_fields(kind.type))
        inner_kind = list_fields(kind.type)[name] if kind.is_group else kind if kind.type is Any else kind.part()
        found[name] = parse(inner_kind, inner, where)
    return found


def _name_and_value(item: str, key: str) -> tuple[str, str]:
    if item[:1] in ("'", '"'):
        end = _end_of_quoted(item)
        name, rest = item[:end], item[end:].strip()
        if rest.startswith(":"):
            return _unquoted(name, item), rest[1:]
    elif (found := re.search(r":(?=\s)", item)) or item.count(":") == 1:
        place = found.start() if found else item.index(":")
        return _ESCAPED.sub(r"\1", item[:place].strip()), item[place + 1 :]
    raise ConfigError(
        f"{key}: {item!r} is no `name: value`. Write a colon with a space behind it between the two; a name with a colon "
        f"of its own stands in quotation marks."
    )


def _items(value: str, key: str) -> list[str]:
    """What stands between the brackets or braces of a value, at its commas."""
    inside = value[1:-1].strip()
    if not inside:
        return []
    items = [item.strip() for item in _parts(inside)]
    if not items[-1] and len(items) > 1:
        items.pop()  # a comma behind the last one, as people write it
    if not all(items):
        raise ConfigError(f"{key}={value}: an item is empty: two commas follow each other.")
    return items


def _parts(text: str) -> list[str]:
    """A text cut at its commas that lie in no brackets and no quotation marks."""
    parts, depth, start = [], [], 0
    for place, letter in _outside_quotes(text):
        if letter in _PAIRS:
            depth.append(_PAIRS[letter])
        elif depth and letter == depth[-1]:
            depth.pop()
        elif letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    if depth:  # brackets that nobody closes are letters of a name
        return text.split(",") if not re.search(r"['\"]", text) else [text]
    return [*parts, text[start:]]


def _outside_quotes(text: str) -> Iterator[tuple[int, str]]:
    """Place and letter of what is in no quotation marks. They begin a value: an apostrophe within a word is a letter."""
    place, fresh = 0, True
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place, fresh = place + 2, False
            continue
        if letter in ("'", '"') and fresh:
            place, fresh = place + _end_of_quoted(text[place:]), False
            continue
        yield place, letter
        if not letter.isspace():
            fresh = letter in ",:[{("
        place += 1


def _end_of_quoted(text: str) -> int:
    """Behind the mark that closes the quoted text which `text` begins with; its whole length where none does."""
    found = re.match(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", text, re.DOTALL)
    return found.end() if found else len(text)


def _wrapped(value: str, opening: str) -> bool:
    """Whether the value is one pair of brackets with all the rest between them."""
    if not (value.startswith(opening) and value.endswith(_PAIRS[opening]) and len(value) > 1):
        return False
    depth, last = 0, len(value) - 1
    for place, letter in _outside_quotes(value):
        depth += (letter == opening) - (letter == _PAIRS[opening])
        if depth == 0 and place < last:
            return False
    return True


def _unquoted(value: str, word: str, key: str = "") -> str:
    """A word without the quotation marks around all of it; one without marks is the same."""
    if value[:1] not in ("'", '"'):
        return value
    if _end_of_quoted(value) != len(value) or len(value) < 2 or value[-1] != value[0]:
        form = f" For a text that begins with the mark write {quote_word(key, value)}." if key else ""
        raise ConfigError(f"{word}: a quotation mark begins the value, and none ends it.{form}")
    return re.sub(rf"\\([\\{value[0]}])", r"\1", value[1:-1])


def _two_ways(key: str, value: str, reason: str) -> ConfigError:
    return ConfigError(f"{key}={show(value)}: {reason}. For the text itself write {quote_word(key, value)}.")


def quote_word(key: str, value: str, in_list: bool = False) -> str:
    """The word as a shell takes it that gives the text as it is."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    inner = f"'{escaped}'"
    return quote_setting(key, f"[{inner}]" if in_list else inner)


def quote_setting(key: str, value: str) -> str:
    """key=value as a shell takes it."""
    word = f"{key}={value}"
    if not re.search(r'["$`!]|\\[^\']', word):
        return f'"{word}"' if re.search(r"[^\w.,/=:+@%-]", word) else word
    return shlex.quote(word)
