"""The tokenizer's files in a Hugging Face folder, such that AutoTokenizer loads them and generation stops where it should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import parse_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# How the common control tokens are spelled, the likelier first.
SPELLINGS = {
    "eos_token": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "unk_token": ("<unk>",),
    "pad_token": ("<pad>", "<|padding|>"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: not there; a Hugging Face folder has a {path.name}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(path, content)


def write_tokenizer(folder: Path, files: Sequence[Path], max_length: int) -> dict[str, int | None]:
    """Copies tokenizer files, and writes the `tokenizer_config.json` that AutoTokenizer needs if there is none.

    Returns the numbers of the control tokens, as config.json names them: None for a token that there is not.
    """
    _copy(folder, files)
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if not (folder / "tokenizer.json").is_file():
        return ids
    special = {
        token["content"]: token["id"]
        for token in read_json(folder / "tokenizer.json").get("added_tokens", ())
        if token.get("special")
    }
    settings_file = folder / "tokenizer_config.json"
    if settings_file.is_file():
        settings = read_json(settings_file)
    else:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
        for key, spellings in SPELLINGS.items():
            found = next((token for token in spellings if token in special), None)
            if found is not None:
                settings[key] = found
        settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for key in ids:
        token = settings.get(key.removesuffix("_id"))
        ids[key] = special.get(token["content"] if isinstance(token, dict) else token)
    return ids


def _copy(folder: Path, files: Sequence[Path]) -> None:
    for path in files:
        if path.is_dir():
            _copy(folder, [path / name for name in TOKENIZER_FILES if (path / name).is_file()])
        elif path.name in TOKENIZER_FILES:
            shutil.copyfile(path, folder / path.name)
        elif path.suffix in (".json", ".model"):  # transformers knows no other kind, and finds them under these names
            shutil.copyfile(path, folder / f"tokenizer{path.suffix}")
