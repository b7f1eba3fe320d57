"""One save, from staged host copies to a committed folder; every rank runs it, in a background thread or not."""

import json
import os
import pickle
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from megalm.checkpoint.boxes import name_dtype
from megalm.checkpoint.commit import name_step, publish, read_manifest, sync_folder, write_file
from megalm.checkpoint.container import ALIGNMENT, make_frame
from megalm.checkpoint.errors import CheckpointError, NoSpaceError, wants_space
from megalm.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    RANKS,
    STATE,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    encode,
)
from megalm.checkpoint.planner import describe_checkpoint, find_item_region
from megalm.checkpoint.ranks import Ranks
from megalm.checkpoint.staging import StagedChunk


@dataclass(frozen=True)
class SaveRequest:
    """What one rank brings to a save; nothing of it changes any more, whatever the training step does meanwhile."""

    step: int
    folder: Path
    chunks: list[StagedChunk]
    state: bytes
    """The run's state as JSON text; rank 0's is written."""
    rank_state: Any
    layout: dict[str, int]
    only_finite: bool = False
    """Fail where a value is NaN or infinite."""


@dataclass(frozen=True)
class _Written:
    """What one rank wrote: its file, and where each piece's values begin."""

    name: str
    record: FileRecord
    chunks: list[tuple[WriteItem, int, int, int, str]]
    """(piece, archive start, archive length, position of the values, checksum)"""
    rank_state: Any


@dataclass(frozen=True)
class _Failure:
    """Why a rank could not do its part, in words, and whether room on the disk would help."""

    reason: str
    no_space: bool = False

    def error(self, step: int) -> CheckpointError:
        return (NoSpaceError if self.no_space else CheckpointError)(f"step {step}: {self.reason}")


@dataclass(frozen=True)
class Saved:
    """A save that every rank has written."""

    manifest: Manifest
    """Whole on rank 0; without its tensors elsewhere."""
    aside: Path
    """The folder that it was written to."""
    own_files: tuple[str, ...]
    """The files in it that this rank wrote, without the manifest."""


def write_and_commit(request: SaveRequest, ranks: Ranks) -> Manifest:
    """Write this rank's file, and on rank 0 everything else; then publish. Collective.

    Errors: CheckpointError on every rank when any rank failed: then nothing was published, and what was written aside
    is removed if the file system still lets us. It is a NoSpaceError where the disk was full.
    """
    return _save(request, ranks, shared=True).manifest


def write_aside(request: SaveRequest, ranks: Ranks) -> Saved:
    """Write this rank's files into a folder of its own node, to be uploaded from there. Collective; errors as above."""
    return _save(request, ranks, shared=False)


def _save(request: SaveRequest, ranks: Ranks, *, shared: bool) -> Saved:
    aside: Path | None = None
    try:
        begun = ranks.broadcast(_begin(request) if ranks.rank == 0 else None)
        if isinstance(begun, _Failure):
            raise begun.error(request.step)
        aside = request.folder / begun[0]
        return _write(request, ranks, aside, begun[1], shared=shared)
    except Exception as error:
        if (ranks.rank == 0 or not shared) and aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        # Everything of our own is a CheckpointError by now: what is left is talking to the other ranks.
        raise CheckpointError(f"step {request.step}: a rank was lost during the save ({_reason(error)})") from error


def encode_json(value: Any, what: str) -> bytes:
    """`value` as JSON; CheckpointError for what JSON cannot hold (tuples come back as lists)."""
    try:
        _check_keys(value)
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} cannot be saved as JSON: {error}") from None


def _check_keys(value: Any) -> None:
    """JSON would turn a number used as a key into text, silently."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)


def _begin(request: SaveRequest) -> tuple[str, int] | _Failure:
    """Rank 0 makes the folder aside: (its name, the step), or what went wrong."""
    name = f"{name_step(request.step)}.tmp-{os.urandom(6).hex()}"
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
        (request.folder / name).mkdir()
    except OSError as error:
        return _Failure(f"{request.folder}: {error.strerror or error}", wants_space(error))
    return name, request.step


def _write(request: SaveRequest, ranks: Ranks, aside: Path, step: int, *, shared: bool) -> Saved:
    mine: _Written | _Failure
    try:
        if step != request.step:
            raise CheckpointError(f"it is saving step {request.step}, rank 0 step {step}")
        if not shared:
            aside.mkdir(parents=True, exist_ok=True)
        mine = _write_chunks(request, ranks.rank, aside)
    except Exception as error:
        mine = _Failure(f"rank {ranks.rank}: {_reason(error)}", wants_space(error))
    gathered = ranks.gather(mine)
    outcome: Manifest | _Failure | None = None
    if gathered is not None:
        failed = [entry for entry in gathered if isinstance(entry, _Failure)]
        try:
            outcome = failed[0] if failed else _finish(request, aside, gathered, shared=shared)
        except Exception as error:
            outcome = _Failure(f"rank 0: {_reason(error)}", wants_space(error))
    whole = outcome
    if isinstance(outcome, Manifest):
        outcome = replace(outcome, tensors={})  # other ranks need no list of every piece
    outcome = ranks.broadcast(outcome)
    if isinstance(outcome, _Failure):
        raise outcome.error(request.step)
    result = whole if whole is not None else outcome
    assert isinstance(result, Manifest) and isinstance(mine, _Written)
    return Saved(result, aside, (mine.name, *((STATE, RANKS, METADATA) if ranks.rank == 0 else ())))


def _write_chunks(request: SaveRequest, rank: int, aside: Path) -> _Written:
    if request.only_finite:
        _check_finite(request.chunks)
    name = f"__{rank}_0.distcp"
    placed: list[tuple[WriteItem, int, int, int, str]] = []
    record = write_file(aside / name, _archives(request.chunks, placed))
    sync_folder(aside)
    return _Written(name, record, placed, request.rank_state)


def _check_finite(chunks: Iterable[StagedChunk]) -> None:
    """CheckpointError for the first piece with a NaN or an infinity in it.

    A sum is not finite if a value is not, and takes a fraction of the time of looking at each; where it overflowed by
    itself, each is looked at.
    """
    for chunk in chunks:
        assert chunk.item.tensor_data is not None
        dtype = chunk.item.tensor_data.properties.dtype
        if not dtype.is_floating_point:
            continue
        values: Any = torch.from_numpy(chunk.values).view(dtype)
        if dtype in (torch.float32, torch.float64):
            values = values.numpy()
            with np.errstate(all="ignore"):
                good = np.isfinite(values.sum()) or np.isfinite(values).all()
        else:
            good = values.isfinite().all()
        if not good:
            raise CheckpointError(f"{chunk.item.index.fqn} holds values that are not finite")


def _archives(
    chunks: Iterable[StagedChunk], placed: list[tuple[WriteItem, int, int, int, str]]
) -> Iterator[bytes | memoryview]:
    """The file's bytes: one torch.save archive for each piece; fills `placed` with where they are."""
    at = 0
    for chunk in chunks:
        assert chunk.item.tensor_data is not None
        head, tail = make_frame(chunk.item.tensor_data.properties.dtype, find_item_region(chunk.item).shape)
        length = len(head) + chunk.values.nbytes + len(tail)
        placed.append((chunk.item, at, length, at + len(head), chunk.xxh3))
        yield head
        yield chunk.values.data
        yield tail
        padding = -length % ALIGNMENT
        yield bytes(padding)
        at += length + padding


def _finish(request: SaveRequest, aside: Path, written: list[_Written], *, shared: bool) -> Manifest:
    """Rank 0: the small files, the manifest last, and (in a shared folder) the rename."""
    for entry in written if shared else ():
        path = aside / entry.name
        if not path.exists() or path.stat().st_size != entry.record.bytes:
            raise CheckpointError(
                f"{entry.name} is not to be seen from rank 0: {request.folder} must be on storage that all nodes share"
            )
    ranks_text = {
        "world_size": len(written),
        "layout": request.layout,
        "ranks": [entry.rank_state for entry in written],
    }
    files = {entry.name: entry.record for entry in written}
    files[STATE] = write_file(aside / STATE, [request.state])
    files[RANKS] = write_file(aside / RANKS, [encode_json(ranks_text, "the ranks' state")])
    files[METADATA] = write_file(aside / METADATA, [_torch_metadata(written)])
    manifest = Manifest(
        step=request.step,
        attempt=aside.name.rpartition("-")[2],
        saved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        world_size=len(written),
        layout=request.layout,
        versions=list_versions(),
        files=files,
        tensors=_tensors(written),
    )
    write_file(aside / MANIFEST, [encode(manifest)])
    sync_folder(aside)
    if shared:
        publish(aside, request.folder / name_step(request.step))
        read_manifest(request.folder / name_step(request.step))
    return manifest


def _tensors(written: list[_Written]) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    for entry in written:
        for item, _, _, position, xxh3 in entry.chunks:
            data = item.tensor_data
            assert data is not None
            record = tensors.setdefault(
                item.index.fqn, TensorRecord(name_dtype(data.properties.dtype), tuple(data.size))
            )
            record.chunks.append(ChunkRecord(find_item_region(item), entry.name, position, xxh3))
    return tensors


def _torch_metadata(written: list[_Written]) -> bytes:
    """The `.metadata` file that torch's own tools read; megalm never does, because reading a pickle can run code."""
    metadata = describe_checkpoint(item for entry in written for item, *_ in entry.chunks)
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_data = {
        MetadataIndex(item.index.fqn, item.index.offset): _StorageInfo(entry.name, start, length)
        for entry in written
        for item, start, length, _, _ in entry.chunks
    }
    return pickle.dumps(metadata)


def list_versions() -> dict[str, str]:
    """List what wrote the checkpoint."""
    import megalm

    return {
        "megalm": getattr(megalm, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, CheckpointError) else str(error)
