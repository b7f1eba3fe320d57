"""One face over Hugging Face tokenizer.json, Mistral's tekken.json, SentencePiece models and tiktoken rank files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import TOKENIZER_NAMES, parse_json
from megalm.tokenizer.damage import describe_damage
from megalm.tokenizer.encoder import (
    FAST_BACKENDS,
    FORMATS,
    CannotEncode,
    Prompt,
    Tokenizer,
    compute_fingerprint,
    read_bytes,
)
from megalm.tokenizer.huggingface import HuggingFaceTokenizer
from megalm.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megalm.tokenizer.tekken import TekkenTokenizer
from megalm.tokenizer.tiktoken_ranks import TiktokenTokenizer

__all__ = [
    "FAST_BACKENDS",
    "CannotEncode",
    "HuggingFaceTokenizer",
    "Prompt",
    "Tokenizer",
    "compute_fingerprint",
    "load_tokenizer",
]


def load_tokenizer(
    path: str | os.PathLike,
    *,
    backend: str = "auto",
    tiktoken_pattern: str | None = None,
    proven: bool = False,
    control_tokens: bool = False,
    end: str | None = None,
    special: Sequence[str] = (),
) -> Tokenizer:
    """Load the tokenizer in this file, or in this folder (tokenizer.json before tokenizer.model).

    `proven`: another process has compared this backend with the format's own library; it is taken as it is, which saves
    the time. `control_tokens`: their names in a text become control tokens. `end`: the token that ends documents, by name,
    if not the tokenizer's own; `special`: control tokens as NAME=NUMBER, for a tiktoken file, which holds none.

    Errors: ConfigError if there is none, or the file cannot be used.
    """
    name = find_tokenizer_file(os.fspath(path))
    with open(name, "rb") as file:
        start = file.read(256)
    damage = describe_damage(start)
    if damage is not None:
        raise ConfigError(f"{name}: {damage}")
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")):
        raise ConfigError(f"{name}: is UTF-16 text; save it as UTF-8, or give {FORMATS}.")
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start):
        return TiktokenTokenizer(name, tiktoken_pattern, backend, proven, control_tokens, end, special)
    for option, value in (("--special", special), ("--tiktoken-pattern", tiktoken_pattern)):
        if value:
            raise ConfigError(f"{option} is for a .tiktoken rank file, and {name} is none: it says that itself.")
    if start[:1] in (b"[", b'"') or (start[:1] != b"{" and name.endswith(".json")):
        raise ConfigError(f"{name}: not a usable tokenizer.json: it does not hold a JSON object. Give {FORMATS}.")
    if start[:1] != b"{":
        return SentencePieceTokenizer(name, backend, proven, control_tokens, end)
    content = parse_json(Path(name), read_bytes(name))
    if isinstance(content.get("vocab"), list) and isinstance(content.get("config"), dict):
        return TekkenTokenizer(name, backend, proven, control_tokens, end, content)
    if not isinstance(content.get("model"), dict):
        raise ConfigError(f"{name}: {_other_json(content)}. Give {FORMATS}.")
    return HuggingFaceTokenizer(name, backend, proven, control_tokens, end, content)


def find_tokenizer_file(name: str) -> str:
    """Find the tokenizer's file: this one, or the preferred one of a folder. ConfigError if there is none."""
    if os.path.isdir(name):
        files = (os.path.join(name, file) for file in TOKENIZER_NAMES)
        found = next((file for file in files if os.path.exists(file)), None)
        if found is None:
            raise ConfigError(f"{name}: the folder has neither tokenizer.json nor tokenizer.model. Give {FORMATS}.")
        return found
    if not os.path.exists(name):
        raise ConfigError(f"tokenizer {name!r} does not exist. Give {FORMATS}, or train one with --train-bpe.")
    return name


def _other_json(content: dict[str, Any]) -> str:
    """What a JSON file is that is no tokenizer."""
    if content and all(isinstance(value, int) for value in content.values()):
        return "not a usable tokenizer.json but a bare vocabulary (vocab.json), which does not say how text is split"
    if "tokenizer_class" in content or "added_tokens_decoder" in content:
        return "not a usable tokenizer.json but a tokenizer's settings (tokenizer_config.json), which name its files"
    if "model_type" in content or "architectures" in content:
        return "not a usable tokenizer.json but a model's settings (config.json)"
    return "not a usable tokenizer.json: it has no `model`"
