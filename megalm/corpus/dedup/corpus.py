"""What every way of deduplication shares: a corpus cut into shards, and the stages that read it.

Documents are numbered in the order of the input. A stage sees a shard and the number inside it; the first stage
counts, and from then on every document has its number in the whole corpus, whoever runs the stages.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.blocks import Blocks
from megalm.corpus.dedup.files import load_dealt, name_shard_file, save
from megalm.corpus.dedup.places import PLACE, make_bad_record, place_record
from megalm.corpus.dedup.stages import Progress, Stages, describe_recipe
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.documents import BadDocument, Piece, cut_into_pieces, find_files, read_piece
from megalm.corpus.engine import Engine
from megalm.corpus.files import is_stream
from megalm.corpus.json_lines import holds_lines, read_lines
from megalm.corpus.results import Results
from megalm.corpus.shards import make_shards, stamp_files

BATCH_CHARACTERS = 1 << 21  # of text held at a time
BATCH_TEXTS = 1 << 14
DEFAULT_MEMORY = 500_000_000  # bytes, for each worker
PROCESS_MEMORY = 110_000_000  # of a process: Python and its libraries, and the text of a batch with what is made of it
LEAST_SHARE = 20_000_000
Result = TypeVar("Result")


@dataclass(frozen=True)
class CorpusShard:
    """Some pieces of the input, with what is needed to read them."""

    number: int
    pieces: tuple[Piece, ...]
    field: str
    skip_bad: bool

    def read(self) -> Iterator[tuple[Texts, np.ndarray, list[list[Any]]]]:
        """Some documents at a time, where they lie (PLACE [texts]), and what could not be read (see `make_bad_record`; the
        number is that of the documents here).

        Errors: ConfigError at a document that cannot be read, unless `skip_bad`.
        """
        for number, piece in enumerate(self.pieces):
            parts = _lines_of(piece, self.field) if holds_lines(piece) else _texts_of(piece, self)
            for texts, places, bad in explain_read_errors(parts, piece):
                places["piece"] = number
                if bad and not self.skip_bad:
                    wrong = bad[0][1]
                    raise ConfigError(
                        f"{piece.label}: {wrong.place}: {wrong.reason}. Mend it, or pass --skip-bad to leave such out."
                    )
                yield texts, places, [make_bad_record(number, before, found) for before, found in bad]


def explain_read_errors(parts: Iterator[Result], piece: Piece) -> Iterator[Result]:
    """What is read of a piece. Libraries that read raise what they like, and some of it cannot even be sent back by a
    worker: it becomes a ConfigError that names the file."""
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except (ConfigError, OSError, MemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"{piece.label}: cannot be read ({type(error).__name__}: {error}). Restore the file, or leave it out."
            ) from error
        yield part


_Read = tuple[Texts, np.ndarray, list[tuple[int, BadDocument]]]


def _lines_of(piece: Piece, field: str) -> Iterator[_Read]:
    for lines in read_lines(piece, field):
        places = np.zeros(len(lines.ends), PLACE)
        places["at"], places["size"] = lines.begins, lines.sizes
        yield Texts(lines.data, lines.ends, lines.ascii), places, lines.bad


def _texts_of(piece: Piece, shard: CorpusShard) -> Iterator[_Read]:
    texts: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    bad: list[tuple[int, BadDocument]] = []
    held = 0
    for document in read_piece(piece, shard.field, ()):
        if isinstance(document, BadDocument):
            bad.append((len(texts), document))
            if not shard.skip_bad:
                break
            continue
        texts.append(document.text)
        places.append(place_record(0, document.place))
        held += len(document.text)
        if held >= BATCH_CHARACTERS or len(texts) == BATCH_TEXTS:
            yield Texts.of(texts), np.array(places, PLACE), bad
            texts, places, bad, held = [], [], [], 0
    if texts or bad:
        yield Texts.of(texts), np.array(places, PLACE), bad


@dataclass(frozen=True)
class ShardStage:
    """A task: one shard, the folder for what it leaves, and what the stage needs besides."""

    shard: CorpusShard
    folder: str
    argument: Any

    @property
    def label(self) -> str:
        """What errors call it."""
        return self.shard.pieces[0].label

    def path(self, part: str) -> str:
        """The name of a file that belongs to this shard."""
        return name_shard_file(self.folder, self.shard.number, part)

    def batches(self) -> Iterator[Texts]:
        """The texts, some megabytes at a time. The first time that a shard is read, it is written down where each document
        lies, and what could not be read: the files `places`, `paths` and `bad`."""
        if os.path.exists(self.path("places")):
            yield from (texts for texts, _, _ in self.shard.read() if len(texts))
            return
        all_bad: list[list[Any]] = []
        documents = 0
        partial = f"{self.path('places')}.{os.getpid()}.partial"
        with open(partial, "wb") as file:
            for texts, places, bad in self.shard.read():
                file.write(places.data)
                all_bad += [[piece, documents + before, place, why] for piece, before, place, why in bad]
                documents += len(texts)
                if len(texts):
                    yield texts
        for part, content in (("paths", [piece.label for piece in self.shard.pieces]), ("bad", all_bad)):
            save(self.path(part), np.frombuffer(json.dumps(content).encode(), np.uint8))
        os.replace(partial, self.path("places"))


@dataclass(frozen=True)
class PartStage:
    """A task: one part of what was dealt out by hash, over all shards."""

    part: int
    folder: str
    starts: tuple[int, ...]
    """Number of each shard's first document, and of documents in all."""
    argument: Any

    def dealt(
        self, kind: str, dtype: Any, first: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What each shard dealt to this part, or to parts [first, stop): (number of the shard's first document, records)"""
        for shard in range(len(self.starts) - 1):
            records = load_dealt(
                name_shard_file(self.folder, shard, kind), self.part if first is None else first, dtype, stop
            )
            if len(records):
                yield self.starts[shard], records


@dataclass(frozen=True)
class _Unpacking:
    """A task: a compressed file that is to lie in the folder as it was."""

    number: int
    piece: Piece
    folder: str

    @property
    def label(self) -> str:
        return self.piece.label


def _unpack(task: _Unpacking) -> list[dict[str, Any]]:
    """Leaves the content; the piece for it, and another one where the file is damaged."""
    with contextlib.closing(Blocks(task.piece)) as blocks:
        found = iter(lambda: blocks.next(name_shard_file(task.folder, task.number, "unpacked")), None)
        return [asdict(piece) | {"size": os.path.getsize(piece.path) if piece.path else 0} for piece in found]


def share_of(memory: int | None, engine: Engine | None) -> int:
    """What is left for a task of each worker, when every process has what it needs to begin with.

    Errors: ConfigError if that is too little to work with.
    """
    workers = engine.workers if engine else 1
    processes = workers + 1 if workers > 1 else 1
    if memory is None:
        return DEFAULT_MEMORY - 3 * PROCESS_MEMORY // 2  # an interrupted run goes on with any number of workers
    share = (memory - processes * PROCESS_MEMORY) // workers
    if share < LEAST_SHARE:
        least = workers * LEAST_SHARE + processes * PROCESS_MEMORY
        raise ConfigError(
            f"--memory {memory / 1e6:g} is too little for {workers} workers: give at least {least / 1e6:.0f} (MB), or fewer "
            "--workers."
        )
    return share


class Corpus:
    """The documents of files, cut into shards that depend on the input only.

    A compressed file with a large share of the input is unpacked first, so that several workers can read it.

    memory: bytes that all processes of this machine may take together; None: DEFAULT_MEMORY for each worker.

    results: what the command writes; it is no input.

    Stages leave their files in `folder`; without one, in a temporary one. `close` removes it. With a `command`, its name
    and options, the folder of an interrupted run of the same is gone on with, and an error leaves it.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        field: str = "text",
        skip_bad: bool = False,
        engine: Engine | None = None,
        folder: str | None = None,
        command: tuple[str, dict[str, Any]] | None = None,
        progress: Progress | None = None,
        memory: int | None = None,
        results: Results | None = None,
    ):
        self.share = share_of(memory, engine)
        """Bytes that a task may take besides what its process always needs."""
        for item in inputs:
            if is_stream(item):
                raise ConfigError(
                    f"input {item!r} can be read only once, and deduplication reads its input again: write it to a file first."
                )
        progress = progress or Progress()
        self.results = results or Results()
        files = self.results.input_files(find_files(list(inputs), progress.say), progress.say)
        if not files:
            raise ConfigError(
                f"{', '.join(inputs)}: there is nothing but results of this tool. Name one itself to read it."
            )
        self.files = files
        pieces = cut_into_pieces(files)
        recipe = None
        if folder and command:
            options = {**command[1], "field": field, "skip_bad": skip_bad, "share": self.share}
            recipe = describe_recipe(
                command[0], options, [*stamp_files(files), [len(shard) for shard in make_shards(pieces)]]
            )
        self._resumable = recipe is not None
        self.stages = Stages(folder or tempfile.mkdtemp(prefix="dedup-"), engine, recipe, progress)
        self.folder = self.stages.folder
        try:
            shards = make_shards(self._unpacked(files, pieces))
        except BaseException:
            self.close(failed=True)
            raise
        self.shards = [CorpusShard(number, tuple(shard), field, skip_bad) for number, shard in enumerate(shards)]
        self.starts: tuple[int, ...] = ()

    def _unpacked(self, files: list[Piece], pieces: list[Piece]) -> list[Piece]:
        """The pieces; those of compressed files that are to be dealt out, of what they hold."""
        tasks = [_Unpacking(n, piece, self.folder) for n, piece in enumerate(pieces) if piece.block]
        if not tasks:
            return pieces
        results = self.stages.run(_unpack, tasks, "unpacking", [float(task.piece.size) for task in tasks])
        found = {
            task.piece.path: [Piece(**{**content, "broken": tuple(content["broken"])}) for content in result]
            for task, result in zip(tasks, results, strict=True)
        }
        return cut_into_pieces([content for file in files for content in found.get(file.path, [file])])

    def each_shard(
        self, function: Callable[[ShardStage], Result], argument: Any = None, stage: str = ""
    ) -> list[Result]:
        """The function of every shard; the results in the order of the shards. It returns how many documents it saw,
        or a list or tuple with that first. `stage` is what the progress calls it."""
        tasks = [ShardStage(shard, self.folder, argument) for shard in self.shards]
        sizes = [float(sum(piece.size for piece in shard.pieces)) for shard in self.shards]
        results = self.stages.run(function, tasks, stage or "reading", sizes)
        if not self.starts:
            counts = [result if isinstance(result, int) else result[0] for result in results]
            self.starts = tuple(int(n) for n in np.concatenate(([0], np.cumsum(counts, dtype=np.int64))))
        return results

    def each_part(
        self, function: Callable[[PartStage], Result], parts: int, argument: Any = None, stage: str = ""
    ) -> list[Result]:
        """The function of every part of what the shards have dealt out, in order."""
        tasks = [PartStage(part, self.folder, self.starts, argument) for part in range(parts)]
        return self.stages.run(function, tasks, stage or "comparing")

    @property
    def documents(self) -> int:
        """How many there are; known after the first stage."""
        return self.starts[-1]

    def close(self, failed: bool = False) -> None:
        """Removes what the stages left, unless an interrupted run can go on from there."""
        self.stages.close(keep=failed and self._resumable)

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(failed=kind is not None)
