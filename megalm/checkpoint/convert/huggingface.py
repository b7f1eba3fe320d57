"""Hugging Face model folders, in both directions.

A folder is `config.json`, safetensors files and the tokenizer's files; what is written loads with
`transformers.AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. transformers itself is not
needed here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.convert import huggingface_names
from megalm.checkpoint.convert.huggingface_config import choose_architecture, function_of, read_config, write_config
from megalm.checkpoint.convert.rules import Rule
from megalm.checkpoint.convert.source import RuleReader, Source, check_none_left, check_shapes
from megalm.checkpoint.convert.weights import SafetensorsReader, SafetensorsWriter, TorchFilesReader, WeightReader
from megalm.config import ModelConfig
from megalm.config.errors import ConfigError

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

# Settings of a config.json that a trained model keeps although they do not change its function.
KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

Progress = Callable[[str, int], None]
"""Called with each tensor's name and its bytes once it is written."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not there; a Hugging Face folder has a config.json") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None


def open_folder(folder: Path) -> Source:
    """A Hugging Face folder as a Source. ConfigError if a tensor is missing or left over."""
    config_json = read_json(folder / "config.json")
    model = read_config(config_json)
    has_safetensors = any(folder.glob("*.safetensors"))
    stored: WeightReader = SafetensorsReader(folder) if has_safetensors else TorchFilesReader(folder)
    table, ignored = match_names(folder, stored, huggingface_names.rules(model, config_json["model_type"]), model)
    return Source(
        path=folder,
        format="huggingface",
        model=model,
        weights=RuleReader(stored, table),
        foreign_count=len(stored.names()),
        ignored=ignored,
        files=[folder / name for name in TOKENIZER_FILES if (folder / name).is_file()],
        config_json=config_json,
    )


def match_names(
    where: Path, stored: WeightReader, table: Sequence[Rule], model: ModelConfig
) -> tuple[list[Rule], dict[str, str]]:
    """The table with the names as they are stored, and the stored tensors that are left out with the reason.

    Some folders hold the bare inner model: names without `model.` or `transformer.`. Some hold a copy of a tied
    embedding, which must then be the same bits.
    """
    there = set(stored.names())

    def stored_name(rule: Rule) -> str:
        candidates = [rule.foreign, *rule.aliases]
        candidates += [
            name.split(".", 1)[1]
            for name in candidates
            if name.split(".", 1)[0] in ("model", "transformer", "gpt_neox")
        ]
        return next((name for name in candidates if name in there), rule.foreign)

    table = [dataclasses.replace(rule, foreign=stored_name(rule)) for rule in table]
    check_shapes(where, stored, {rule.foreign: rule.shape for rule in table})
    ignored: dict[str, str] = {}
    left = []
    embedding = next(rule.foreign for rule in table if rule.parts[0].name == "embedding.weight")
    for name in sorted(there - {rule.foreign for rule in table}):
        if huggingface_names.RECOMPUTED.search(name):
            ignored[name] = "follows from the configuration"
        elif model.tie_embeddings and name in huggingface_names.TIED_COPIES:
            if not torch.equal(stored.read(name), stored.read(embedding)):
                raise ConfigError(
                    f"{where}: {name} differs from {embedding} although config.json ties them (tie_word_embeddings)"
                )
            ignored[name] = f"is {embedding} again"
        else:
            left.append(name)
    check_none_left(where, left)
    return table, ignored


def config_json_for(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json to write: the one the model came with where it still describes it, else a new one."""
    name = str(dtype).removeprefix("torch.")
    before = source.config_json
    if before is not None and function_of(read_config(before)) == function_of(source.model):
        result = {key: value for key, value in before.items() if key not in ("dtype", "torch_dtype")}
        return {**result, "dtype" if "dtype" in before else "torch_dtype": name}
    preferred = before["model_type"] if before else None
    kept = {key: before[key] for key in KEPT_KEYS if key in before} if before else {}
    return {**write_config(source.model, preferred=preferred, dtype=name), **kept}


def write_folder(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda name, size: None,
) -> int:
    """Writes a Source as a Hugging Face folder, tensor by tensor. Returns the number of tensors written.

    `dtype` None keeps each tensor as it is. `tokenizer`: a `tokenizer.json` or a folder with tokenizer files; None:
    the source's own.
    """
    if tokenizer is not None and not tokenizer.exists():
        raise ConfigError(f"{tokenizer}: no tokenizer here; give a tokenizer.json or a folder that has one")
    # The embedding's dtype stands for the whole model's.
    main_dtype = dtype or source.weights.dtype("embedding.weight")
    config_json = config_json_for(source, main_dtype)
    table = huggingface_names.rules(source.model, config_json["model_type"])
    check_none_left(
        source.path, sorted(set(source.weights.names()) - {part.name for rule in table for part in rule.parts})
    )
    check_shapes(source.path, source.weights, {part.name: part.shape for rule in table for part in rule.parts})
    layout = [(rule.foreign, rule.shape, dtype or source.weights.dtype(rule.parts[0].name)) for rule in table]
    writer = SafetensorsWriter(folder, layout, max_shard_bytes=max_shard_bytes)
    try:
        for rule, (_, _, target_dtype) in zip(table, layout, strict=True):
            tensor = rule.join([source.weights.read(part.name) for part in rule.parts]).to(target_dtype)
            writer.write(rule.foreign, tensor)
            progress(rule.foreign, tensor.nbytes)
    except BaseException:
        writer.abort()
        raise
    writer.close()
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    write_tokenizer(folder, [tokenizer] if tokenizer else source.files, source.model.seq_length)
    return len(table)


def write_tokenizer(folder: Path, files: Sequence[Path], max_length: int) -> None:
    """Copies tokenizer files, and writes the `tokenizer_config.json` that AutoTokenizer needs if there is none."""
    for path in files:
        if path.is_dir():
            write_tokenizer(folder, [path / name for name in TOKENIZER_FILES if (path / name).is_file()], max_length)
        elif path.name in TOKENIZER_FILES:
            shutil.copyfile(path, folder / path.name)
        elif path.suffix in (".json", ".model"):  # transformers knows no other kind, and finds them under these names
            shutil.copyfile(path, folder / f"tokenizer{path.suffix}")
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
        special = [
            token["content"]
            for token in read_json(folder / "tokenizer.json").get("added_tokens", ())
            if token.get("special")
        ]
        for key, spellings in (
            ("eos_token", ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")),
            ("bos_token", ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")),
            ("unk_token", ("<unk>",)),
            ("pad_token", ("<pad>", "<|padding|>")),
        ):
            found = next((token for token in spellings if token in special), None)
            if found is not None:
                settings[key] = found
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


__all__ = [
    "choose_architecture",
    "config_json_for",
    "match_names",
    "open_folder",
    "read_json",
    "write_folder",
    "write_tokenizer",
]
