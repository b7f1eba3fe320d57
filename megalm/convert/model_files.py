"""The files that belong to a model beside its weights: tokenizer, chat templates, generation settings, licence.

They travel with the model: an import keeps them in the run's folder, training names that folder as its tokenizer, and an
export writes them again, so that a chat model is one still.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import TOKENIZER_NAMES
from megalm.tokenizer.damage import describe_damage
from megalm.tokenizer.tokenizer import compute_fingerprint

NAMES = (
    *TOKENIZER_NAMES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates",
    "additional_chat_templates",
    "generation_config.json",
)
"""In the root of a Hugging Face folder, beside config.json and the weights; the folders with all that lies in them."""
PATTERNS = ("*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
CARD = "README.md"
GENERATION = "generation_config.json"


def find_belonging_files(folder: Path, *, card: bool = False) -> list[Path]:
    """Find a folder's files that travel with its model. ConfigError for one that is not what its name says."""
    found = [folder / name for name in (*NAMES, *([CARD] if card else [])) if (folder / name).exists()]
    for pattern in PATTERNS:
        found += sorted(path for path in folder.glob(pattern) if path.is_file())
    for path in found:
        if path.is_file():
            with open(path, "rb") as stream:
                what = describe_damage(stream.read(512))
            if what is not None:
                raise ConfigError(f"{path}: {what}")
    return found


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copies files, and folders with what lies in them. A lone tokenizer gets the name that transformers looks for."""
    for path in files:
        name = path.name
        if name not in NAMES and name != CARD and path.suffix in (".json", ".model"):
            name = f"tokenizer{path.suffix}"
        if path.is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / name)


def find_tokenizer(folder: Path) -> Path | None:
    """Find what the tokenizer of a folder is loaded from: the folder, or its .tiktoken file; None where there is none."""
    if any((folder / name).is_file() for name in TOKENIZER_NAMES):
        return folder
    return next(iter(sorted(folder.glob("*.tiktoken"))), None)


def find_tokenizer_files(path: Path) -> list[Path]:
    """Find the files of a tokenizer that is given as a folder, as the standard file in a folder, or as a file of its own."""
    if path.is_dir():
        return find_belonging_files(path)
    if path.name in TOKENIZER_NAMES:
        return find_belonging_files(path.parent)
    return [path]


def find_config_beside(path: Path) -> Path | None:
    """Find the config.json of the folder that a tokenizer belongs to, where it has one."""
    folder = path if path.is_dir() else path.parent if path.name in TOKENIZER_NAMES else None
    return folder / "config.json" if folder is not None and (folder / "config.json").is_file() else None


def is_same_tokenizer(first: Path, second: Path) -> bool:
    """True where two tokenizers are the same file, byte for byte."""
    return compute_fingerprint(str(first)) == compute_fingerprint(str(second))


def find_again(name: str, folders: Sequence[Path]) -> Path | None:
    """Find the file or folder that a run's configuration names: where it says, or below one of the folders above the run.

    A relative name is of the folder that the run was started in, which is mostly a folder above the run's own.
    """
    path = Path(name)
    places = [path] if path.is_absolute() else [path, *(folder / path for folder in folders)]
    return next((place for place in places if place.exists()), None)
