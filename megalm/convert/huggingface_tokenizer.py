"""The tokenizer's files in a Hugging Face folder, such that AutoTokenizer loads them and generation stops where it should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.convert.model_files import copy_files, find_tokenizer
from megalm.tokenizer.control_tokens import ControlTokens, parse_json, read_optional_json
from megalm.tokenizer.tokenizer import load_tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; ConfigError where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: not there; a Hugging Face folder has a {path.name}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(path, content)


def write_tokenizer(folder: Path, files: Sequence[Path], max_length: int) -> ControlTokens:
    """Copies a model's files, and writes the `tokenizer_config.json` that AutoTokenizer needs if there is none.

    Returns the control tokens of the tokenizer that is then there, none of them where there is no tokenizer.
    """
    copy_files(files, folder)
    path = find_tokenizer(folder)
    if path is None:
        return ControlTokens()
    tokenizer = load_tokenizer(path)
    settings_file = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() and not settings_file.is_file():
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
        control = tokenizer.control
        named = {
            "bos_token": control.begin,
            "eos_token": control.end,
            "pad_token": control.pad,
            "unk_token": control.unknown,
        }
        settings |= {key: tokenizer.name_of(number) for key, number in named.items() if number is not None}
        settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer.control


def has_chat_template(folder: Path) -> bool:
    """True where a folder's tokenizer can lay out a conversation."""
    files = ("chat_template.jinja", "chat_template.json", "chat_templates", "additional_chat_templates")
    if any((folder / name).exists() for name in files):
        return True
    return bool(read_optional_json(folder / "tokenizer_config.json").get("chat_template"))
