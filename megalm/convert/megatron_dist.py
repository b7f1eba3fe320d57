"""Megatron-LM's `torch_dist` checkpoints, in both directions.

They are torch.distributed.checkpoint folders whose keys do not depend on the layout: names as with Transformer
Engine, the layers stacked on a first axis, tensors whole (all gate rows, then all up rows). Beside the weights lie
arguments (`common.pt`, or since newer versions the object `common_state/shard_0_1`) and the optimizer's state: tensors
like the weights', `optimizer.state.{param, exp_avg, exp_avg_sq}.<name>`, where it was saved fully reshardable, else
buckets of one layout, which stay behind.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megalm.config.errors import ConfigError
from megalm.convert import megatron_names, restricted
from megalm.convert.huggingface_tokenizer import read_json
from megalm.convert.megatron_args import read_args, write_args
from megalm.convert.megatron_keys import Place, find_place, list_extra_states, list_places, list_plain_names
from megalm.convert.megatron_legacy import TRACKER
from megalm.convert.megatron_names import EMBEDDING, OUTPUT, count_padded_rows
from megalm.convert.rules import Rule
from megalm.convert.source import OptimizerState, RuleReader, Source, check_none_left, check_shapes, drop_tied_output

RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
"""What Megatron keeps of how the optimizer's state was saved, and asks for before it loads it."""
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
# Not weights: what only Megatron's own trainer reads.
KINDS = ("param", "exp_avg", "exp_avg_sq")
_OPTIMIZER = re.compile(rf"^optimizer\.state\.({'|'.join(KINDS)})\.(.+)$")
OPTIMIZER_REASON = "is the optimizer's"
_OTHER_STATE = re.compile(r"^(optimizer|rng_state|rerun_state_machine|opt_param_scheduler|common_state)")


def is_torch_dist(folder: Path) -> bool:
    """True where the folder is one iteration of a torch_dist checkpoint."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()


class DistributedFiles:
    """The weights of a torch_dist folder under plain names, layer by layer, although the layers are stored stacked."""

    def __init__(self, folder: Path):
        self.folder = folder
        backend = read_json(folder / "metadata.json")
        if backend.get("sharded_backend") != "torch_dist":
            found = backend.get("sharded_backend")
            raise ConfigError(
                f"{folder}/metadata.json: sharded_backend={found!r} is not supported; supported: 'torch_dist'"
            )
        metadata = restricted.load_metadata(folder / ".metadata")
        self._stored: dict[str, TensorStorageMetadata] = {}
        self._places: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {}
        self._objects: dict[str, _StorageInfo] = {}
        for index, place in metadata.storage_data.items():
            if index.offset is None:
                self._objects[index.fqn] = place
            else:
                self._places[index.fqn, tuple(index.offset)] = place
        self.recomputed: list[str] = []
        self.other_state: list[str] = []
        # kind ("" for weights) -> plain name -> (stored key, index in its first axes)
        self._origin: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {kind: {} for kind in ("", *KINDS)}
        self.optimizer_keys: list[str] = []
        for key, entry in metadata.state_dict_metadata.items():
            match = _OPTIMIZER.match(key)
            if match and isinstance(entry, TensorStorageMetadata):
                self._stored[key] = entry
                self._add(key, entry, match[2], match[1])
                self.optimizer_keys.append(key)
            elif _OTHER_STATE.match(key):
                self.other_state.append(key)
            elif megatron_names.RECOMPUTED.search(key.split("/")[0]):
                self.recomputed.append(key)
            elif isinstance(entry, TensorStorageMetadata):
                self._stored[key] = entry
                self._add(key, entry, key, "")
            else:
                self.other_state.append(key)  # objects are never weights
        common = self._common()
        if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
            raise ConfigError(
                f"{folder}: no training arguments in {COMMON_FILE} or {COMMON_OBJECT}; it is not Megatron-LM's"
            )
        self.args: Namespace = common["args"]
        self.iteration = int(common.get("iteration", 0) or 0)
        groups = _groups(common.get("optimizer"))
        self.updates, self.settings = _updates(groups) or self.iteration, _settings(groups)

    def _add(self, key: str, entry: TensorStorageMetadata, name: str, kind: str) -> None:
        name = re.sub(r"^(module\.|model\.)+", "", name)
        self._origin[kind].update({plain: (key, index) for plain, index in list_plain_names(name, entry.size)})

    def _common(self) -> Any:
        if (self.folder / COMMON_FILE).is_file():
            return restricted.load(self.folder / COMMON_FILE)
        place = self._objects.get(COMMON_OBJECT)
        return restricted.load(io.BytesIO(self._bytes(place))) if place else None

    def _bytes(self, place: _StorageInfo) -> bytes:
        file = self.folder / Path(place.relative_path).name
        try:
            with open(file, "rb") as stream:
                stream.seek(place.offset)
                data = stream.read(place.length)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}; copy the whole checkpoint") from None
        if len(data) != place.length:
            raise ConfigError(f"{file}: ends early; it is truncated, copy it again")
        return data

    def names(self, kind: str = "") -> list[str]:
        return list(self._origin[kind])

    def shape(self, name: str, kind: str = "") -> tuple[int, ...]:
        key, index = self._origin[kind][name]
        return tuple(self._stored[key].size)[len(index) :]

    def dtype(self, name: str, kind: str = "") -> torch.dtype:
        return self._stored[self._origin[kind][name][0]].properties.dtype

    def read(self, name: str, kind: str = "") -> Tensor:
        """Read the tensor from those stored chunks that hold a part of it."""
        key, index = self._origin[kind][name]
        size = list(self._stored[key].size)
        begin = [*index, *[0] * (len(size) - len(index))]
        end = [*(place + 1 for place in index), *size[len(index) :]]
        result = torch.empty([e - b for b, e in zip(begin, end, strict=True)], dtype=self.dtype(name, kind))
        filled = 0
        for chunk in self._stored[key].chunks:
            first = [max(b, o) for b, o in zip(begin, chunk.offsets, strict=True)]
            last = [min(e, o + s) for e, o, s in zip(end, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            part = self._chunk(key, chunk)
            target = result
            for dim, (a, b) in enumerate(zip(first, last, strict=True)):
                target = target.narrow(dim, a - begin[dim], b - a)
                part = part.narrow(dim, a - chunk.offsets[dim], b - a)
            target.copy_(part)
            filled += target.numel()
        if filled != result.numel():
            raise ConfigError(f"{self.folder}: only {filled} of the {result.numel()} elements of {name} are there")
        return result[(0,) * len(index)] if index else result

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places.get((key, tuple(chunk.offsets)))
        if place is None:
            raise ConfigError(f"{self.folder}/.metadata: says nothing of where {key} at {tuple(chunk.offsets)} lies")
        tensor = restricted.load(io.BytesIO(self._bytes(place)))
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(chunk.sizes):
            raise ConfigError(
                f"{self.folder}: {key} at {tuple(chunk.offsets)} is not a tensor of shape {tuple(chunk.sizes)}"
            )
        return tensor


class _Part:
    """One kind of the optimizer's tensors as a WeightReader."""

    def __init__(self, files: DistributedFiles, kind: str):
        self.files, self.kind = files, kind

    def names(self) -> list[str]:
        return self.files.names(self.kind)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(name, self.kind)

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtype(name, self.kind)

    def read(self, name: str) -> Tensor:
        return self.files.read(name, self.kind)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """Read the optimizer's parameter groups; none where they are not as Megatron writes them."""
    groups = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else {}
    groups = groups.get("param_groups") if isinstance(groups, dict) else None
    return [group for group in groups or [] if isinstance(group, dict)]


def _updates(groups: Sequence[dict[str, Any]]) -> int:
    """Read the number of updates made from the groups; 0 where they do not say."""
    steps = [group.get("step") for group in groups]
    return max((int(step) for step in steps if isinstance(step, int | float | Tensor)), default=0)


def _settings(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the groups, and first that whose weights decay, say of an OptimizerState's settings."""
    first = max(groups, key=lambda group: float(group.get("wd_mult", 0.0)), default={})
    found = {key: float(first[key]) for key in ("lr", "eps", "weight_decay") if isinstance(first.get(key), int | float)}
    betas = first.get("betas")
    return {**found, **({"betas": (float(betas[0]), float(betas[1]))} if betas else {})}


def _written_groups(state: OptimizerState) -> list[dict[str, Any]]:
    """Groups for all weights that Megatron tells apart: with and without decay, and a learning rate of their own."""
    return [
        {
            "wd_mult": decay, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": decoupled,
            "step": state.step, "lr": state.lr, "max_lr": state.lr, "min_lr": 0.0, "bias_correction": True,
            "betas": state.betas, "eps": state.eps, "weight_decay": state.weight_decay * decay,
        }
        for decay in (1.0, 0.0)
        for decoupled in (False, True)
    ]  # fmt: skip


def _optimizer_state(files: DistributedFiles, table: Sequence[Rule], seq_length: int) -> OptimizerState | None:
    """Open the optimizer's state, if all of it is there in the weights' own shapes."""
    parts = [_Part(files, kind) for kind in KINDS]
    wanted = {rule.foreign: rule.shape for rule in table}
    if any({name: part.shape(name) for name in part.names()} != wanted for part in parts):
        return None
    weights, exp_avg, exp_avg_sq = (RuleReader(part, table) for part in parts)
    samples = int(getattr(files.args, "consumed_train_samples", 0) or 0)
    return OptimizerState(weights, exp_avg, exp_avg_sq, files.updates, samples * seq_length, **files.settings)


def open_dist(folder: Path, vocab_size: int | None = None) -> Source:
    """Open an iteration's torch_dist folder as a Source."""
    files = DistributedFiles(folder)
    model = read_args(files.args, vocab_size)
    # The rows of a stored embedding follow the layout that it was first saved on.
    rows = files.shape(EMBEDDING)[0] if EMBEDDING in files.names() else files.args.padded_vocab_size
    table = megatron_names.make_megatron_rules(model, tensor=1, padded_vocab_size=rows)
    check_shapes(folder, files, {rule.foreign: rule.shape for rule in table})
    ignored = dict.fromkeys(files.recomputed, "follows from the configuration")
    ignored |= dict.fromkeys(files.other_state, "is not a weight")
    # Two optimizers chained have a mixture's, of the experts and of the rest.
    optimizer = None if model.moe.num_experts else _optimizer_state(files, table, model.seq_length)
    ignored |= dict.fromkeys(files.optimizer_keys, OPTIMIZER_REASON if optimizer else "is not a weight")
    left = set(files.names()) - {rule.foreign for rule in table}
    if model.tie_embeddings:
        drop_tied_output(folder, files, left, ignored, output=OUTPUT, embedding=EMBEDDING)
    check_none_left(folder, sorted(left))
    return Source(
        path=folder,
        format="megatron",
        model=model,
        weights=RuleReader(files, table),
        foreign_count=len(files.names()) + len(files.recomputed) + len(files.other_state) + len(files.optimizer_keys),
        ignored=ignored,
        step=files.iteration,
        optimizer=optimizer,
    )


def write_dist(
    source: Source,
    folder: Path,
    *,
    spelling: str = "te",
    pad_vocabulary: int = 128,
    dtype: torch.dtype | None = None,
    optimizer: OptimizerState | None = None,
    progress: Any = lambda name, size: None,
) -> int:
    """Writes a torch_dist folder, tensor by tensor. Returns the number of tensors, a layer's each counted.

    `optimizer`: also the state of the optimizer, as Megatron saves it fully reshardable.

    Megatron loads it on any layout; `pad_vocabulary` should be its --make-vocab-size-divisible-by times tensor ranks.
    """
    if spelling != "te":
        raise ConfigError(f"--names {spelling} is not what torch_dist uses: Megatron core stores its names there, te.")
    model = source.model
    if optimizer is not None and model.moe.num_experts:
        raise ConfigError(
            f"model.moe.num_experts={model.moe.num_experts}: the optimizer's state of a mixture cannot be written for Megatron, "
            "which chains two optimizers there; write the weights alone."
        )
    padded = count_padded_rows(model.vocab_size, pad_vocabulary, 1)
    args = write_args(model, tensor=1, pipeline=1, virtual=1, padded_vocab_size=padded)
    table = megatron_names.make_megatron_rules(model, tensor=1, padded_vocab_size=padded)
    check_none_left(
        source.path, sorted(set(source.weights.names()) - {part.name for rule in table for part in rule.parts})
    )
    check_shapes(source.path, source.weights, {part.name: part.shape for rule in table for part in rule.parts})
    target = folder / (f"iter_{source.step:07d}" if source.step else "release")
    target.mkdir(parents=True, exist_ok=True)
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with open(target / "__0_0.distcp", "wb") as stream:
        for rule in table:
            tensor = rule.join([source.weights.read(part.name) for part in rule.parts])
            tensor = tensor.to(dtype or tensor.dtype)
            for place in list_places(model, rule.foreign):
                _write_chunk(stream, entries, places, place, tensor)
            progress(rule.foreign, tensor.nbytes)
        objects = _write_extra_states(stream, places, list_extra_states(model))
        for kind, part in zip(KINDS, optimizer.parts().values() if optimizer else (), strict=False):
            for rule in table:
                tensor = rule.join([part.read(piece.name) for piece in rule.parts])
                prefix = f"optimizer.state.{kind}."
                _write_chunk(stream, entries, places, find_place(model, rule.foreign), tensor, prefix)
                progress(prefix + rule.foreign, tensor.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": source.step}
    if optimizer is not None:
        common["optimizer"] = {"optimizer": {"param_groups": _written_groups(optimizer)}}
        common["optimizer"]["param_state_sharding_type"] = RESHARDABLE["distrib_optim_sharding_type"]
        common["content_metadata"] = RESHARDABLE
        args.consumed_train_samples = optimizer.tokens // model.seq_length
    torch.save(common, target / COMMON_FILE)
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (target / "metadata.json").write_text(json.dumps(backend))
    with open(target / ".metadata", "wb") as stream:
        pickle.dump(Metadata(state_dict_metadata={**entries, **objects}, storage_data=places), stream)
    (folder / TRACKER).write_text(f"{source.step}" if source.step else "release")
    return len(table) * (1 + len(KINDS) * (optimizer is not None))


def _write_extra_states(
    stream: IO[bytes], places: dict[MetadataIndex, _StorageInfo], names: Sequence[str]
) -> dict[str, BytesStorageMetadata]:
    """Append an empty state under each name."""
    data = io.BytesIO()
    torch.save([None], data)
    for name in names:
        places[MetadataIndex(name)] = _StorageInfo("__0_0.distcp", stream.tell(), data.tell())
        stream.write(data.getbuffer())
    return dict.fromkeys(names, BytesStorageMetadata())


def _write_chunk(
    stream: IO[bytes],
    entries: dict[str, TensorStorageMetadata],
    places: dict[MetadataIndex, _StorageInfo],
    place: Place,
    tensor: Tensor,
    prefix: str = "",
) -> None:
    """Append one tensor at its place in what is stored under `prefix` + its key."""
    name = prefix + place.key
    size = torch.Size([*place.sizes, *tensor.shape])
    offsets = [*place.index, *[0] * tensor.dim()]
    tensor = tensor.view([1] * len(place.index) + list(tensor.shape))
    if name not in entries:
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [])
    entries[name].chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
    data = io.BytesIO()
    torch.save(tensor.clone(), data)
    index = MetadataIndex(name, offsets, len(entries[name].chunks) - 1)
    places[index] = _StorageInfo("__0_0.distcp", stream.tell(), data.tell())
    stream.write(data.getbuffer())
