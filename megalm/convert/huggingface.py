"""Hugging Face model folders, in both directions.

A folder is `config.json`, safetensors files and the tokenizer's files; what is written loads with
`transformers.AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. transformers itself is not
needed here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert import huggingface_names
from megalm.convert.block_fp8 import BlockFp8Reader, read_fp8_block
from megalm.convert.huggingface_config import collect_function, read_config, read_settings, write_config
from megalm.convert.huggingface_settings import EVERYTHING
from megalm.convert.huggingface_tokenizer import has_chat_template, read_json, write_tokenizer
from megalm.convert.model_card import write_card
from megalm.convert.model_files import (
    CARD,
    find_belonging_files,
    find_tokenizer,
    find_tokenizer_files,
    is_same_tokenizer,
)
from megalm.convert.rules import Rule
from megalm.convert.source import RuleReader, Source, check_none_left, check_shapes
from megalm.convert.weight_files import choose_weight_files
from megalm.convert.weights import SafetensorsWriter, WeightReader
from megalm.tokenizer.control_tokens import ControlTokens

Progress = Callable[[str, int], None]
"""Called with each tensor's name and its bytes once it is written."""


def open_folder(folder: Path, accept: Collection[str] = ()) -> Source:
    """Open a Hugging Face folder as a Source. ConfigError if a tensor is missing or left over.

    accept: settings of its config.json that are not known here and may be passed over.
    """
    config_json = read_json(folder / "config.json")
    block = read_fp8_block(config_json)
    if block is not None:  # what is read, and exported again, is no longer quantized
        config_json = {key: value for key, value in config_json.items() if key != "quantization_config"}
    reading = read_settings(config_json, accept)
    model = reading.model
    chosen = choose_weight_files(folder)
    stored: WeightReader = chosen.open()
    if block is not None:
        stored = BlockFp8Reader(stored, block)
        reading.notes.append(f"config.json: weights in fp8, with scales of blocks {list(block)}, are read as bfloat16")
    if model.prediction.depth and not any(map(partial(_is_behind, model), stored.names())):
        reading.notes.append(
            f"config.json: {model.prediction.depth} layers behind the last one predict further tokens, and the files have none"
        )
        model.prediction.depth = 0
    model_type = config_json["model_type"]
    rules = huggingface_names.make_huggingface_rules(model, model_type)
    copies = huggingface_names.list_prediction_copies(model, model_type)
    table, ignored = match_names(folder, stored, rules, model, copies)
    return Source(
        path=folder,
        format="huggingface",
        model=model,
        weights=RuleReader(stored, table),
        foreign_count=len(stored.names()),
        ignored=ignored,
        files=find_belonging_files(folder, card=True),
        tokenizer=find_tokenizer(folder),
        config_json=config_json,
        notes=[*reading.notes, *chosen.notes],
    )


def match_names(
    where: Path, stored: WeightReader, table: Sequence[Rule], model: ModelConfig, copies: Sequence[Rule] = ()
) -> tuple[list[Rule], dict[str, str]]:
    """Match the table with the names as they are stored; also gives the stored tensors that are left out, with the reason.

    Some folders hold the bare inner model: names without `model.` or `transformer.`. Some hold a copy of a tied
    embedding, which must then be the same bits; copies: tensors that layers which predict further tokens may have once more.
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
    places = {part.name: rule.foreign for rule in table for part in rule.parts}
    again = {rule.foreign: places[rule.parts[0].name] for rule in copies}
    embedding = next(rule.foreign for rule in table if rule.parts[0].name == "embedding.weight")
    for name in sorted(there - {rule.foreign for rule in table}):
        if huggingface_names.RECOMPUTED.search(name):
            ignored[name] = "follows from the configuration"
        elif name in again:
            same = torch.equal(stored.read(name), stored.read(again[name]))
            ignored[name] = f"is {again[name]} again" if same else f"is read as {again[name]}, from which it differs"
        elif model.moe.num_experts and _is_behind(model, name):
            ignored[name] = "predicts further tokens, and config.json counts no such layer"
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


_OF_TRAINING = ".router.load_shares"
"""What a mixture's balance keeps between updates, and no reader of weights needs."""
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


def _is_behind(model: ModelConfig, name: str) -> bool:
    """Whether a tensor is of a layer behind the last one, as GLM-4.5 and DeepSeek-V3 have them for multi-token prediction."""
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= model.num_layers


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def choose_config_json(source: Source, dtype: torch.dtype, control: ControlTokens | None) -> dict[str, Any]:
    """Choose the config.json to write: the one the model came with where it still describes it, else a new one.

    control: the tokens of another tokenizer than the model came with; None: config.json's own numbers are right, and go
    before what its tokenizer says. A new config.json names also those that there are not: transformers would otherwise
    assume numbers that are ordinary words here.
    """
    name = str(dtype).removeprefix("torch.")
    before = source.config_json
    same = read_config(before, EVERYTHING) if before is not None else None
    counted = same.prediction.depth if same is not None else 0
    if same is not None:
        same.prediction.depth = source.model.prediction.depth  # files may have fewer such layers than were counted
    if before is not None and same is not None and collect_function(same) == collect_function(source.model):
        result = {key: value for key, value in before.items() if key not in ("dtype", "torch_dtype")}
        if counted != source.model.prediction.depth:
            result = {k: v for k, v in result.items() if k != "num_mtp_layers"}
            result["num_nextn_predict_layers"] = source.model.prediction.depth
    else:
        preferred = before["model_type"] if before else None
        result = write_config(source.model, preferred=preferred)
    kept = {key: before[key] for key in TOKEN_IDS if before and key in before}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **kept}
    if control is not None:
        ids = {"bos_token_id": control.begin, "eos_token_id": control.end, "pad_token_id": control.pad}
    return {**result, **ids, "dtype": name}


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
    files = find_tokenizer_files(tokenizer) if tokenizer is not None else source.files
    if source.training is not None:
        files = [path for path in files if path.name != CARD]  # the card of the model that it was before
    # The embedding's dtype stands for the whole model's.
    main_dtype = dtype or source.weights.dtype("embedding.weight")
    config_json = choose_config_json(source, main_dtype, None)
    table = huggingface_names.make_huggingface_rules(source.model, config_json["model_type"])
    left = set(source.weights.names()) - {part.name for rule in table for part in rule.parts}
    check_none_left(source.path, sorted(name for name in left if not name.endswith(_OF_TRAINING)))
    check_shapes(source.path, source.weights, {part.name: part.shape for rule in table for part in rule.parts})
    table += huggingface_names.list_prediction_copies(source.model, config_json["model_type"])
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written as such a folder has been refused by now
    control = write_tokenizer(folder, files, source.model.position_limit)
    if source.config_json is None or not (tokenizer is None or _came_with(source, tokenizer)):
        config_json = choose_config_json(source, main_dtype, control)
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
    if source.training is not None:
        parameters = sum(math.prod(rule.shape) for rule in table)
        card = write_card(source.training, source.model, parameters, chat=has_chat_template(folder))
        (folder / CARD).write_text(card, encoding="utf-8")
    return len(table)


def _came_with(source: Source, tokenizer: Path) -> bool:
    """True where a tokenizer that was given is the one that the model has anyway."""
    return source.tokenizer is not None and is_same_tokenizer(tokenizer, source.tokenizer)
