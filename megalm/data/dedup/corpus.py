"""What every way of deduplication shares: a corpus cut into shards, and the stages that read it.

Documents are numbered in the order of the input. A stage sees a shard and the number inside it; the first stage
counts, and from then on every document has its number in the whole corpus, whoever runs the stages.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.documents import BadDocument, Document, Piece, cut_into_pieces, find_files, read_piece
from megalm.data.engine import Engine, LocalEngine
from megalm.data.shards import make_shards

BATCH_CHARACTERS = 1 << 21  # of text held at a time
Result = TypeVar("Result")


@dataclass(frozen=True)
class CorpusShard:
    """Some pieces of the input, with what is needed to read them."""

    number: int
    pieces: tuple[Piece, ...]
    field: str
    skip_bad: bool

    def __iter__(self) -> Iterator[tuple[str, Document | BadDocument]]:
        """(file, document)

        Errors: ConfigError at a document that cannot be read, unless `skip_bad`.
        """
        for piece in self.pieces:
            for document in read_piece(piece, self.field):
                if isinstance(document, BadDocument) and not self.skip_bad:
                    raise ConfigError(
                        f"{piece.path}: {document.place}: {document.reason}. Mend it, or pass --skip-bad to leave such out."
                    )
                yield piece.path, document

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Only those that could be read."""
        return ((path, found) for path, found in self if isinstance(found, Document))


@dataclass(frozen=True)
class ShardStage:
    """A task: one shard, the folder for what it leaves, and what the stage needs besides."""

    shard: CorpusShard
    folder: str
    argument: Any

    @property
    def label(self) -> str:
        """What errors call it."""
        return self.shard.pieces[0].path

    def path(self, part: str) -> str:
        """The name of a file that belongs to this shard."""
        return shard_path(self.folder, self.shard.number, part)

    def batches(self) -> Iterator[list[str]]:
        """The texts, some megabytes at a time; where each document lies is written down, to be looked up by number."""
        ends = [0]
        partial = self.path(f"places.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            texts: list[str] = []
            held = 0
            for path, document in self.shard.documents():
                ends.append(ends[-1] + file.write(json.dumps({"file": path, "place": document.place}).encode() + b"\n"))
                texts.append(document.text)
                held += len(document.text)
                if held >= BATCH_CHARACTERS:
                    yield texts
                    texts, held = [], 0
            if texts:
                yield texts
        save(self.path("places.bounds"), np.array(ends, "<i8"))
        os.replace(partial, self.path("places"))


@dataclass(frozen=True)
class PartStage:
    """A task: one part of what was dealt out by hash, over all shards."""

    part: int
    folder: str
    starts: tuple[int, ...]
    """Number of each shard's first document, and of documents in all."""
    argument: Any


def shard_path(folder: str, number: int, part: str) -> str:
    """Where a shard's file of this kind is."""
    return os.path.join(folder, f"{number:06d}.{part}")


def save(path: str, array: np.ndarray) -> None:
    """Raw, aside, and renamed: a task that runs twice leaves one whole file."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "wb") as file:
        file.write(np.ascontiguousarray(array).data)
    os.replace(partial, path)


def load(path: str, dtype: Any, start: int = 0, stop: int = -1) -> np.ndarray:
    """Elements [start, stop) of a file that `save` left; stop -1: the end."""
    size = np.dtype(dtype).itemsize
    return np.fromfile(path, dtype, -1 if stop < 0 else stop - start, offset=start * size)


class Corpus:
    """The documents of files, cut into shards that depend on the input only.

    Stages leave their files in `folder`; without one, in a temporary one. `close` removes it.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        field: str = "text",
        skip_bad: bool = False,
        engine: Engine | None = None,
        folder: str | None = None,
    ):
        pieces = cut_into_pieces(find_files(list(inputs)))
        self.shards = [
            CorpusShard(number, tuple(shard), field, skip_bad) for number, shard in enumerate(make_shards(pieces))
        ]
        self.engine = engine or LocalEngine(1)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).mkdir(parents=True)
        self.folder = os.path.abspath(folder) if folder else tempfile.mkdtemp(prefix="dedup-")
        self.starts: tuple[int, ...] = ()

    def each_shard(self, function: Callable[[ShardStage], Result], argument: Any = None) -> list[Result]:
        """The function of every shard; the results in the order of the shards. It returns how many documents it saw,
        or something with them first."""
        stages = [ShardStage(shard, self.folder, argument) for shard in self.shards]
        results = self._mapped(function, stages)
        if not self.starts:
            counts = [result[0] if isinstance(result, tuple) else result for result in results]
            self.starts = tuple(int(n) for n in np.concatenate(([0], np.cumsum(counts, dtype=np.int64))))
        return results

    def each_part(self, function: Callable[[PartStage], Result], parts: int, argument: Any = None) -> list[Result]:
        """The function of every part of what the shards have dealt out, in order."""
        return self._mapped(function, [PartStage(part, self.folder, self.starts, argument) for part in range(parts)])

    def _mapped(self, function: Callable[[Any], Any], stages: Sequence[ShardStage | PartStage]) -> list[Any]:
        tasks = [_Numbered(number, function, stage) for number, stage in enumerate(stages)]
        found: dict[int, Any] = dict(self.engine.map(_call, tasks))
        return [found[number] for number in range(len(tasks))]

    @property
    def documents(self) -> int:
        """How many there are; known after the first stage."""
        return self.starts[-1]

    def close(self) -> None:
        """Removes what the stages left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Numbered:
    number: int
    function: Callable[[Any], Any]
    stage: ShardStage | PartStage

    @property
    def label(self) -> str:
        return getattr(self.stage, "label", f"part {self.number}")


def _call(task: _Numbered) -> tuple[int, Any]:
    return task.number, task.function(task.stage)


def deal(owner: np.ndarray, parts: int, records: np.ndarray, path: str) -> None:
    """Writes the records grouped by their part, and where each group begins (int64 [parts + 1]) under PATH.bounds."""
    order = np.argsort(owner, kind="stable")
    save(f"{path}.bounds", np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=parts)))).astype("<i8"))
    save(path, records[order])


def dealt(task: PartStage, kind: str, dtype: Any) -> Iterator[tuple[int, np.ndarray]]:
    """What each shard dealt to this part: (number of the shard's first document, records)"""
    for shard in range(len(task.starts) - 1):
        path = shard_path(task.folder, shard, kind)
        start, stop = load(f"{path}.bounds", "<i8", task.part, task.part + 2)
        if stop > start:
            yield task.starts[shard], load(path, dtype, int(start), int(stop))


def place_of(folder: str, starts: Sequence[int], number: int) -> dict[str, str]:
    """File and place of a document by its number in the corpus."""
    shard = int(np.searchsorted(starts, number, side="right")) - 1
    path = shard_path(folder, shard, "places")
    start, stop = load(f"{path}.bounds", "<i8", number - starts[shard], number - starts[shard] + 2)
    with open(path, "rb") as file:
        file.seek(int(start))
        return json.loads(file.read(int(stop - start)))
