"""Which ids begin, end and pad a text: one answer for every tokenizer format, for training, writing and export.

A model's folder may name its control tokens in five files, and they do not always agree. Asked in this order, as
transformers does:

1. by name, in `tokenizer_config.json`, and in `special_tokens_map.json`, which wins unless `tokenizer_config.json` lists
   `added_tokens_decoder` (then the map is one of an older save, and is not read);
2. by number, in `generation_config.json`, then `config.json`;
3. what the tokenizer's own file says (a SentencePiece model knows its begin and end, a tiktoken encoding its end);
4. the common spellings among the control tokens of `tokenizer.json`; where there is a `tokenizer_config.json`, only for
   the end token, which every document needs.

The files count only for a tokenizer that has the name they belong to (`tokenizer.json`, `tokenizer.model`,
`*.tiktoken`): a `mine_tokenizer.json` beside another model's `tokenizer_config.json` is not that model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.tokenizer.damage import describe_damage

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
"""The files that a folder's tokenizer may lie in, the preferred first."""
SPELLINGS = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[CLS]", "[BOS]"),
    "eos_token": (
        "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]", "[EOS]",
    ),
    "pad_token": ("<pad>", "<|padding|>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}  # fmt: skip
"""How the common control tokens are spelled, the likelier first."""


@dataclass(frozen=True)
class ControlTokens:
    """Ids of a tokenizer's control tokens; None for one that it does not have."""

    begin: int | None = None
    end: int | None = None
    pad: int | None = None
    unknown: int | None = None
    add_begin: bool = False
    """The folder asks for the begin token before every text (`add_bos_token`). A tokenizer.json says it itself."""
    add_end: bool = False
    """The folder asks for the end token after every text (`add_eos_token`)."""
    doubts: tuple[str, ...] = ()
    """What the files say against each other, in sentences."""


@dataclass(frozen=True)
class FolderSettings:
    """What the files beside a tokenizer say of control tokens, as they say it."""

    tokenizer: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json with special_tokens_map.json worked in."""
    generation: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def name(self, key: str) -> str | None:
        """Name a control token, `eos_token` say."""
        value = self.tokenizer.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def says_none(self, key: str) -> bool:
        """True where the tokenizer is said to have no such token (Qwen has no begin token, whatever its config.json says).

        Not for the end token: a document needs one, and the model's own serves.
        """
        return key != "eos_token" and key in self.tokenizer and self.tokenizer[key] is None

    def numbers(self, key: str) -> tuple[int, ...]:
        """The ids that the model's files give for `eos_token_id` and its like: generation_config.json's, else config.json's."""
        for settings in (self.generation, self.model):
            value = settings.get(key)
            values = value if isinstance(value, list) else [value]
            ids = tuple(number for number in values if isinstance(number, int) and not isinstance(number, bool))
            if ids:
                return ids
        return ()


def read_folder_settings(folder: Path) -> FolderSettings:
    """Read the control tokens' settings in the files of a folder. ConfigError where one of them is damaged."""
    tokenizer = read_optional_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in tokenizer:
        tokenizer = {**tokenizer, **read_optional_json(folder / "special_tokens_map.json")}
    return FolderSettings(
        tokenizer=tokenizer,
        generation=read_optional_json(folder / "generation_config.json"),
        model=read_optional_json(folder / "config.json"),
    )


def read_settings_beside(file: Path) -> FolderSettings:
    """Read the settings that belong to a tokenizer's file: those beside it, if it has the name of a folder's tokenizer."""
    own = file.name in TOKENIZER_NAMES or file.suffix == ".tiktoken"
    return read_folder_settings(file.parent) if own else FolderSettings()


def resolve_control_tokens(
    settings: FolderSettings,
    token_id: Callable[[str], int | None],
    *,
    known: Callable[[int], bool],
    own: ControlTokens | None = None,
    special: Collection[str] = (),
) -> ControlTokens:
    """Resolve the control tokens of a tokenizer.

    token_id: the number of a token by its exact name; known: whether the tokenizer has a number at all; own: what its
    file says by itself; special: names of the control tokens that the common spellings may be looked for in.
    """
    own = own or ControlTokens()
    doubts: list[str] = []
    found: dict[str, int | None] = {}
    for key, of_file in (
        ("bos_token", own.begin),
        ("eos_token", own.end),
        ("pad_token", own.pad),
        ("unk_token", own.unknown),
    ):
        if settings.says_none(key):
            found[key] = None
            continue
        name = settings.name(key)
        chosen = token_id(name) if name is not None else None
        if name is not None and chosen is None:
            doubts.append(f"tokenizer_config.json names {key}={name!r}, which the tokenizer does not have")
        numbers = settings.numbers(f"{key}_id")
        if chosen is None:
            chosen = next((number for number in numbers if known(number)), None)
        elif numbers and chosen not in numbers:
            doubts.append(f"{key} is {name!r} ({chosen}) for the tokenizer, and {list(numbers)} for the model")
        if chosen is None:
            chosen = of_file
        if chosen is None and (key == "eos_token" or not settings.tokenizer):
            chosen = find_first_spelling(key, special, token_id)
        found[key] = chosen
    return ControlTokens(
        begin=found["bos_token"],
        end=found["eos_token"],
        pad=found["pad_token"],
        unknown=found["unk_token"],
        add_begin=settings.tokenizer.get("add_bos_token") is True,
        add_end=settings.tokenizer.get("add_eos_token") is True,
        doubts=tuple(doubts),
    )


def find_first_spelling(key: str, special: Collection[str], token_id: Callable[[str], int | None]) -> int | None:
    """Find the likeliest of the common spellings that is one of the control tokens."""
    return next((token_id(name) for name in SPELLINGS[key] if name in special), None)


def list_missing_ids(ids: Iterable[int], size: int) -> list[int]:
    """List the numbers below `size` that no token has, in order."""
    there = set(ids)
    return [number for number in range(size) if number not in there]


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file, empty where there is no file. ConfigError where it is damaged."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(path, content)


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Parse the JSON object in a file's bytes. ConfigError that says what the file is instead."""
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        what = describe_damage(content[:4096]) or f"not valid JSON ({error})"
        raise ConfigError(f"{path}: {what}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds {type(found).__name__} where a JSON object {{...}} is expected")
    return found
