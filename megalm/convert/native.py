"""megalm's own run folders and checkpoints as the source or target of a conversion."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from megalm.checkpoint.boxes import look_up_dtype
from megalm.checkpoint.manifest import compute_checksum
from megalm.checkpoint.planner import CHUNK_BYTES, write_item
from megalm.checkpoint.ranks import SingleRank
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.regions import Region, cut
from megalm.checkpoint.save import SaveRequest, encode_json, write_and_commit
from megalm.config import Config
from megalm.config.errors import ConfigError
from megalm.config.model_file import write_model_yaml
from megalm.config.saved import load_config, make_config, write_config_yaml
from megalm.convert.huggingface_tokenizer import read_json
from megalm.convert.model_card import collect_training_facts
from megalm.convert.model_files import (
    copy_files,
    find_again,
    find_belonging_files,
    find_config_beside,
    find_tokenizer,
    find_tokenizer_files,
    is_same_tokenizer,
)
from megalm.convert.source import OptimizerState, Source, StateWeights
from megalm.convert.weights import SafetensorsWriter, WeightReader

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
ORIGIN = "huggingface"
"""Sub-folder that keeps the config.json and tokenizer files that a model came with."""
MODEL = "model.yaml"
"""The model's settings as `+model=PATH` takes them."""


class CheckpointWeights:
    """The weights of a checkpoint (and the optimizer's tensors), each stored piece compared with its checksum as it is read.

    With a prefix: those of the optimizer's tensors whose names begin with it, under the weights' names.
    """

    def __init__(self, reader: CheckpointReader, *, optimizer: bool = False, prefix: str = ""):
        self._reader = reader
        self._optimizer = optimizer
        self._prefix = prefix
        self._tensors = reader.manifest.tensors

    def names(self) -> list[str]:
        return self._reader.names(optimizer=self._optimizer)  # with a prefix: each weight has one of each kind

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self._prefix + name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return look_up_dtype(self._tensors[self._prefix + name].dtype)

    def read(self, name: str) -> Tensor:
        return self._reader.tensor(self._prefix + name)


def find_config(path: Path) -> Path:
    """Find the config.yaml of the run that a run's folder, its checkpoints or one of them belongs to."""
    path = path.absolute()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    raise ConfigError(f"{path}: no config.yaml here or above; give the folder of a run (runs/NAME)")


def open_native(path: Path) -> Source:
    """Open a run's folder (its newest good checkpoint), or one of its checkpoints, as a Source.

    A run that keeps its checkpoints elsewhere (`checkpoint.path`, which may be a URL) is read from there.
    """
    config_file = find_config(path)
    elsewhere = load_config(config_file).checkpoint.path if config_file.parent == path.absolute() else None
    weights = CheckpointWeights(reader := CheckpointReader(elsewhere or path))
    # The checkpoint's own configuration is the one that it was trained with, whatever was tried in the folder since.
    own = reader.state().get("config")
    config = make_config(own, reader.path) if own else load_config(config_file)
    belongings = find_belongings(config, config_file.parent)
    return Source(
        path=reader.path,
        format="megalm",
        model=config.model,
        weights=weights,
        foreign_count=len(weights.names()),
        files=belongings.files,
        tokenizer=belongings.tokenizer,
        config_json=read_json(belongings.config) if belongings.config is not None else None,
        step=reader.step,
        optimizer=_optimizer_state(reader, config),
        notes=belongings.notes,
        training=collect_training_facts(config, config_file.parent, reader.step, reader.state().get("tokens", 0)),
    )


@dataclass
class Belongings:
    """What a run's model has beside its weights, and where it lies."""

    files: list[Path] = field(default_factory=list)
    tokenizer: Path | None = None
    config: Path | None = None
    notes: list[str] = field(default_factory=list)


def find_belongings(config: Config, run: Path) -> Belongings:
    """Find the files that belong to a run's model.

    The tokenizer is the one that config.yaml names. Where it is that of the model that the run was imported as, or began
    from (`checkpoint.load_path`), all that was imported with it is taken, wherever the tokenizer's copy lies.
    """
    above = run.resolve().parents
    origins = [run / ORIGIN]
    if config.checkpoint.load_path:
        begun_from = find_again(str(config.checkpoint.load_path), above)
        if begun_from is not None:
            origins += [folder / ORIGIN for folder in (begun_from, begun_from.parent, begun_from.parent.parent)]
    origin = next((folder for folder in origins if folder.is_dir()), None)
    named = find_again(config.data.tokenizer, above) if config.data.tokenizer else None
    notes = []
    if named is not None:
        if origin is None or find_tokenizer(origin) is None or not is_same_tokenizer(named, origin):
            tokenizer = find_tokenizer(named) if named.is_dir() else named
            return Belongings(find_tokenizer_files(named), tokenizer, find_config_beside(named))
    elif config.data.tokenizer:
        instead = f"; that of {origin} is taken" if origin is not None else "; give it with --tokenizer"
        notes.append(f"the run's tokenizer {config.data.tokenizer} is not there any more{instead}")
    if origin is None:
        return Belongings(notes=notes)
    settings = origin / "config.json"
    return Belongings(
        find_belonging_files(origin, card=True), find_tokenizer(origin), settings if settings.is_file() else None, notes
    )


def _optimizer_state(reader: CheckpointReader, config: Config) -> OptimizerState | None:
    """Open the AdamW state of a checkpoint that has one."""
    names = reader.names()
    moments = [f"optimizer.{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names]
    if set(moments) != set(reader.names(optimizer=True)) - set(names):
        return None
    state = reader.state()
    return OptimizerState(
        weights=CheckpointWeights(reader),
        exp_avg=CheckpointWeights(reader, prefix="optimizer.exp_avg."),
        exp_avg_sq=CheckpointWeights(reader, prefix="optimizer.exp_avg_sq."),
        step=state.get("optimizer", {}).get("step", reader.step),
        tokens=state.get("tokens", 0),
        lr=config.optim.lr,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )


def write_native(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    optimizer: OptimizerState | None = None,
    progress: Any = lambda name, size: None,
) -> int:
    """Writes a run's folder with one checkpoint of the source's step, tensor by tensor. Returns the number of tensors.

    Training starts from it with `+model=FOLDER/model.yaml checkpoint.load=weights checkpoint.load_path=FOLDER`, and with
    `optimizer` goes on without `checkpoint.load=weights`: its weights are then the fp32 ones, and its state has no place in
    the data, so a run begins there at the first sample.
    """
    weights = source.weights if optimizer is None else StateWeights(optimizer)
    names = weights.names()
    # The model that these weights are of: a run that begins with them is compared with it.
    state = {"step": source.step, "tokens": 0, "converted_from": source.format, "model": asdict(source.model)}
    if optimizer is not None:
        state |= {"tokens": optimizer.tokens, "optimizer": {"step": optimizer.step}, "lr_scale": 1.0, "hooks": {}}
    config = Config(model=source.model)
    _save(folder / CHECKPOINTS, source.step, _Pieces(weights, names, dtype, progress), state)
    config.run.name, config.run.dir = folder.name, str(folder.parent)
    if source.config_json is not None or source.files:
        kept = folder / ORIGIN
        kept.mkdir(exist_ok=True)
        if source.config_json is not None:
            (kept / "config.json").write_text(json.dumps(source.config_json, indent=2) + "\n")
        copy_files(source.files, kept)
        tokenizer = find_tokenizer(kept)
        if tokenizer is not None:
            config.data.tokenizer = str(tokenizer)
    (folder / CONFIG).write_text(write_config_yaml(config))
    (folder / MODEL).write_text(write_model_yaml(source.model))
    return len(names)


def merge(path: Path, target: Path, progress: Any = None) -> tuple[int, int]:
    """Writes a checkpoint again as one file. Returns the number of tensors and of bytes.

    A folder gets everything a run resumes from, on any layout: weights, optimizer, state (not the ranks' random states, which
    belong to the layout they were saved on) and the configuration. `FILE.safetensors` gets the weights.
    """
    reader = CheckpointReader(path)
    alone = target.suffix == ".safetensors"
    if target.exists() and (alone or not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists; choose another name, or remove it")
    weights = CheckpointWeights(reader, optimizer=not alone)
    names = weights.names()
    layout = [(name, weights.shape(name), weights.dtype(name)) for name in names]
    size = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in layout)
    tell = progress(size) if progress else (lambda name, size: None)
    if alone:
        writer = SafetensorsWriter(target.parent, layout, max_shard_bytes=size, name=target.name)
        try:
            for name in names:
                tensor = weights.read(name)
                writer.write(name, tensor)
                tell(name, tensor.nbytes)
        except BaseException:
            writer.abort()
            raise
        writer.close()
        return len(names), size
    config = find_config(path)
    _save(target / CHECKPOINTS, reader.step, _Pieces(weights, names, None, tell), reader.state())
    shutil.copyfile(config, target / CONFIG)
    return len(names), size


def _save(folder: Path, step: int, pieces: _Pieces, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    request = SaveRequest(
        step=step,
        folder=folder,
        chunks=pieces,  # type: ignore[arg-type]  # a stream in place of a list: it is gone through once
        state=encode_json(state, "the state"),
        rank_state=None,
        layout={},
    )
    write_and_commit(request, SingleRank())


@dataclass(frozen=True)
class _Piece:
    """What a save asks of a staged chunk (see megalm.checkpoint.staging.StagedChunk)."""

    item: WriteItem
    values: np.ndarray
    xxh3: str


class _Pieces:
    """The pieces of a save, made one after the other as they are asked for: one tensor is in memory at a time."""

    def __init__(self, weights: WeightReader, names: list[str], dtype: torch.dtype | None, progress: Any):
        self.weights, self.names, self.dtype, self.progress = weights, names, dtype, progress

    def __iter__(self) -> Iterator[_Piece]:
        for name in self.names:
            tensor = self.weights.read(name)
            tensor = tensor.to(self.dtype or tensor.dtype)
            whole = Region((0,) * tensor.dim(), tuple(tensor.shape))
            for region in cut(whole, CHUNK_BYTES // tensor.dtype.itemsize):
                part = tensor
                for dim, (start, size) in enumerate(zip(region.offset, region.shape, strict=True)):
                    part = part.narrow(dim, start, size)
                values = part.contiguous().reshape(-1).view(torch.uint8).numpy()
                yield _Piece(
                    write_item(name, tensor.shape, tensor.dtype, region), values, compute_checksum(values.data)
                )
            self.progress(name, tensor.nbytes)
