"""Which of a Hugging Face folder's files hold the model's weights.

A folder often has more than one answer: shards left over from an earlier save beside a newer single file, the same
weights in PyTorch's format, in the original authors' format, in another precision. transformers asks in the order below
and takes the first that is there; so does megalm, and it says what it left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.convert.weights import SafetensorsReader, TorchFilesReader, WeightReader
from megalm.tokenizer.control_tokens import parse_json

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, the first first."""
INDEX = ".index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?:safetensors|bin)")
WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
OPTIMIZER_FILES = ("training_args.bin", "optimizer.bin", "scheduler.bin")
"""What transformers' Trainer leaves beside a model: no weights."""


@dataclass(frozen=True)
class WeightFiles:
    """The files to read, and in words what lies beside them and was not read."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def open(self) -> WeightReader:
        """Open all tensors of the files."""
        if self.files[0].suffix == ".bin":
            return TorchFilesReader(self.files)
        return SafetensorsReader(self.files)


def choose_weight_files(folder: Path) -> WeightFiles:
    """Choose a Hugging Face folder's files of weights. ConfigError, with what there is, where none can be read."""
    there = sorted(
        path for path in folder.iterdir() if path.name.endswith(WEIGHTS) and path.name not in OPTIMIZER_FILES
    )
    notes: list[str] = []
    for name in ORDER:
        path = folder / name
        if not path.exists():
            continue
        files = _listed(path) if name.endswith(INDEX) else (path,)
        index = path if name.endswith(INDEX) else None
        break
    else:
        files, index = _complete_shards(folder, there), None
        notes.append(f"{files[0].name} and its like are read without an index, which transformers would ask for")
    chosen = {path.name for path in files} | ({index.name} if index else set())
    left = [path.name for path in there if path.name not in chosen]
    stale = [name for name in left if _rivals(name)]
    others = [name for name in left if not _rivals(name)]
    if stale:
        first = index.name if index else files[0].name
        notes.append(
            f"{first} is read, as transformers does; {_some(stale)} beside it {'is' if len(stale) == 1 else 'are'} not: "
            "left from another save? If that is the model that is meant, move the other away"
        )
    if others:
        notes.append(f"not read: {_some(others)} ({_what(others[0])})")
    return WeightFiles(files, tuple(notes))


def _rivals(name: str) -> bool:
    """True for a file that could be this very model's weights in one of the names that transformers takes."""
    return name in ORDER or SHARD.fullmatch(name) is not None


def _listed(index: Path) -> tuple[Path, ...]:
    """Read the files of an index. ConfigError where one is missing, or does not hold what the index says."""
    table = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ConfigError(f"{index}: no weight_map in it that names a file for each tensor; copy the folder again")
    files = [index.parent / Path(name).name for name in sorted(set(table.values()))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{index}: lists {missing[0].name}, which is not there; copy the whole folder")
    return tuple(files)


def _complete_shards(folder: Path, there: list[Path]) -> tuple[Path, ...]:
    """Find the one set of shards that is all there, in a folder without an index."""
    sets: dict[tuple[str, str, str], list[Path]] = {}
    for path in there:
        match = SHARD.fullmatch(path.name)
        if match and match["stem"] in ("model", "pytorch_model"):
            sets.setdefault((match["stem"], match["count"], path.suffix), []).append(path)
    whole = [files for (_, count, _), files in sets.items() if len(files) == int(count)]
    if len(whole) == 1:
        return tuple(whole[0])
    if not there:
        raise ConfigError(
            f"{folder}: no weights here; a Hugging Face folder has model.safetensors, model.safetensors.index.json with "
            "its files, or pytorch_model.bin"
        )
    found = f"{folder}: neither {', '.join(ORDER[:-1])} nor {ORDER[-1]}, but {_some([path.name for path in there])}"
    raise ConfigError(f"{found}: {_what(there[0].name, alone=True)}")


def _what(name: str, alone: bool = False) -> str:
    """Say what a file of weights is that is not the model's, and what to do where there is no other."""
    if name.startswith("adapter_model"):
        what, way = (
            "an adapter (LoRA), not a model",
            "merge it into its base model (peft: merge_and_unload, save_pretrained)",
        )
    elif name.startswith("consolidated"):
        what, way = "the authors' own format", "take the files that transformers reads, or convert them with its script"
    elif SHARD.fullmatch(name):
        what, way = "one of several files", "copy the whole folder, with its index"
    elif name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".pth")):
        what, way = f"a {name.rsplit('.', 1)[1]} file", "save it with transformers' save_pretrained first"
    elif re.fullmatch(r"(model|pytorch_model)\.[^.]+\.(safetensors|bin)", name):
        variant = name.split(".")[1]
        plain = name.replace(f".{variant}", "")
        what, way = f"the variant {variant!r} of the weights", f"if it is the one that is meant, rename it to {plain}"
    else:
        plain = "pytorch_model.bin" if name.endswith(".bin") else "model.safetensors"
        what, way = "not a name of a model's weights", f"if it holds the whole model, rename it to {plain}"
    return f"{what}; {way}" if alone else what


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
