"""From documents to a token file: a manifest of shards, a pure function over shards, and a merge in the manifest's
order.

A shard is a list of pieces that depends only on the input; its tokens are written aside under its number and renamed
when whole. A large compressed file gives a shard for each block of it, made when a worker will soon be free for it, and
removed behind it. So the result does not depend on the number of workers, an interrupted run goes on where it was, and a
lost worker costs its shard.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import xxhash

from megalm.config.errors import ConfigError
from megalm.corpus.blocks import Blocks
from megalm.corpus.documents import BadDocument, Document, Piece, read_piece
from megalm.corpus.engine import Engine
from megalm.corpus.json_lines import holds_lines, read_texts
from megalm.corpus.losses import Losses, Watch, try_round_trips
from megalm.data.formats.store import LocalFile
from megalm.data.tokens import choose_token_dtype
from megalm.tokenizer.tokenizer import CannotEncode, Tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 21  # encoded at a time: bounds the memory of a worker
PROOF_CHARACTERS = 1 << 16  # of each of three places of the input: `tokenizers` needs a twentieth of a second for one
LISTED = 1000  # skipped documents named in the report; all are counted


@dataclass(frozen=True)
class Settings:
    """Everything besides the input that decides the tokens."""

    tokenizer: str
    field: str = "text"
    append_eos: bool = True
    prepend_bos: bool = False
    eos: str | None = None
    """Name of the end-of-document token, or NAME=NUMBER; None: the tokenizer's own."""
    min_characters: int = 1
    max_characters: int | None = None
    language_field: str | None = None
    languages: tuple[str, ...] = ()
    skip_bad: bool = False
    backend: str = "auto"
    tiktoken_pattern: str | None = None
    control_tokens: bool = False
    """Names of control tokens in a text become those tokens."""
    special: tuple[str, ...] = ()
    """Control tokens as NAME=NUMBER, of a tiktoken file."""


@dataclass
class Tally:
    """What went through, for one source and one language."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    """Of the tokens, those that stand for what the vocabulary lacks."""
    dropped: int = 0
    """Characters that no token stands for."""

    def add(self, other: Tally) -> None:
        """Adds another one to this."""
        self.documents += other.documents
        self.characters += other.characters
        self.bytes += other.bytes
        self.tokens += other.tokens
        self.unknown += other.unknown
        self.dropped += other.dropped


@dataclass
class ShardResult:
    """What a finished shard says of itself; its tokens are in the file of its number."""

    shard: int
    documents: int = 0
    tokens: int = 0
    input_bytes: int = 0
    filtered: int = 0
    empty: int = 0
    bad: int = 0
    listed: list[str] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    """Keyed by source and language, joined by a tab."""
    losses: Losses = field(default_factory=Losses)
    checksum: str = ""
    """Of its tokens, by which those that an interrupted run left are known to be whole."""


def check_tokenizer(settings: Settings, proven: bool = False) -> Tokenizer:
    """Loads it and makes sure that it has the control tokens that are asked for.

    Errors: ConfigError naming the token that is missing.
    """
    tokenizer = load_tokenizer(
        settings.tokenizer,
        backend=settings.backend,
        tiktoken_pattern=settings.tiktoken_pattern,
        proven=proven,
        control_tokens=settings.control_tokens,
        end=settings.eos,
        special=settings.special,
    )
    if settings.append_eos and tokenizer.eos_id is None:
        raise ConfigError(
            f"{settings.tokenizer} has no end-of-document "
            f"token{f' {settings.eos!r}' if settings.eos else ' that is known'}: "
            "name one with --eos TOKEN (--eos TOKEN=NUMBER for a tiktoken file, which does not hold it), or write documents "
            "without an end by --no-eos."
        )
    if settings.prepend_bos and tokenizer.bos_id is None:
        raise ConfigError(f"{settings.tokenizer} has no begin-of-document token: leave out --bos.")
    return tokenizer


def tokenize_shard(
    number: int,
    pieces: Sequence[Piece],
    settings: Settings,
    tokenizer: Tokenizer,
    folder: str,
    most: int | None = None,
) -> ShardResult:
    """Encodes the shard's documents in order, the first `most` of them, and leaves `NUMBER.tokens`, `NUMBER.lengths`,
    `NUMBER.json` in the folder."""
    result, checksum = ShardResult(number), xxhash.xxh3_64()
    dtype = choose_token_dtype(tokenizer.vocab_size)
    watch = Watch(
        tokenizer,
        control_wanted=settings.control_tokens,
        has_begin=settings.prepend_bos,
        has_end=settings.append_eos,
    )
    paths = {part: os.path.join(folder, f"{number:06d}.{part}") for part in ("tokens", "lengths", "json")}
    mine = f".{os.getpid()}.partial"  # an engine may run a task twice at once
    with open(paths["tokens"] + mine, "wb") as tokens, open(paths["lengths"] + mine, "wb") as lengths:
        for batch in _batches(pieces, settings, result, most):
            encoded, wanted = _encode(batch, settings, tokenizer, result)
            texts = [document.text for document in wanted]
            stream, counts = _joined(encoded, settings, tokenizer)
            if len(stream) and int(stream.max()) >= tokenizer.vocab_size:
                raise ConfigError(
                    f"{settings.tokenizer}: made the token {stream.max()}, beyond its {tokenizer.vocab_size}."
                )
            lost = watch.count(texts, stream, counts)
            result.losses.add(lost.total())
            columns = (counts.tolist(), lost.unknown.tolist(), lost.dropped.tolist())
            for document, count, unknown, dropped in zip(wanted, *columns, strict=True):
                text, tally = document.text, result.tallies.get(document.key)
                if tally is None:
                    tally = result.tallies[document.key] = Tally()
                tally.documents += 1
                tally.characters += len(text)
                tally.bytes += len(text) if text.isascii() else len(text.encode())
                tally.tokens += count
                tally.unknown += unknown
                tally.dropped += dropped
            data = stream.astype(dtype).data
            tokens.write(data)
            checksum.update(data)
            lengths.write(counts.data)
            result.documents += len(texts)
            result.tokens += len(stream)
    result.checksum = checksum.hexdigest()
    for part in ("tokens", "lengths"):
        os.replace(paths[part] + mine, paths[part])
    with open(paths["json"] + mine, "w", encoding="utf-8") as file:
        json.dump(asdict(result), file)
    os.replace(paths["json"] + mine, paths["json"])
    return result


class _Wanted(NamedTuple):
    """A text that is to be encoded."""

    key: str
    """Its source and language."""
    text: str
    file: str
    place: str


def _encode(
    batch: Sequence[_Wanted], settings: Settings, tokenizer: Tokenizer, result: ShardResult
) -> tuple[list[np.ndarray], list[_Wanted]]:
    """(ids, document) of those that the tokenizer has ids for. The others are bad documents."""
    try:
        return tokenizer.encode_batch([document.text for document in batch]), list(batch)
    except CannotEncode:
        pass  # which of them it is shows one by one
    encoded, wanted = [], []
    for document in batch:
        try:
            encoded.append(tokenizer.encode(document.text))
            wanted.append(document)
        except CannotEncode as error:
            _leave_out(document.file, document.place, str(error).rstrip("."), settings, result)
    return encoded, wanted


def _leave_out(file: str, place: str, reason: str, settings: Settings, result: ShardResult) -> None:
    """Counts and lists a bad document, or stops at it. Errors: ConfigError"""
    if not settings.skip_bad:
        raise ConfigError(
            f"{file}: {place}: {reason}. Mend it, or pass --skip-bad to leave out and list what cannot be read."
        )
    result.bad += 1
    if len(result.listed) < LISTED:
        result.listed.append(f"{file}: {place}: {reason}")


def _joined(encoded: Sequence[np.ndarray], settings: Settings, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All documents with their ends, one after another, and the length of each. Shapes: -> uint32 [N], int64 [documents]"""
    begin, end = int(settings.prepend_bos), int(settings.append_eos)
    bos, eos = tokenizer.bos_id or 0, tokenizer.eos_id or 0  # each is there where it is asked for
    counts = np.array([len(ids) for ids in encoded], "<i8") + (begin + end)
    stream = np.empty(int(counts.sum()), np.uint32)
    at = 0
    for ids in encoded:
        if begin:
            stream[at] = bos
        at += begin
        stream[at : at + len(ids)] = ids
        at += len(ids)
        if end:
            stream[at] = eos
        at += end
    return stream, counts


def _batches(
    pieces: Sequence[Piece], settings: Settings, result: ShardResult, most: int | None
) -> Iterator[list[_Wanted]]:
    wanted = _wanted_documents(pieces, settings, result)
    batch: list[_Wanted] = []
    held = 0
    for document in itertools.islice(wanted, most):
        batch.append(document)
        held += len(document.text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _wanted_documents(pieces: Sequence[Piece], settings: Settings, result: ShardResult) -> Iterator[_Wanted]:
    """What is to be encoded; what is left out is counted in the result."""
    others = [settings.language_field] if settings.language_field else []
    for piece in pieces:
        name = piece.label
        texts_alone = holds_lines(piece) and not others
        found = read_texts(piece, settings.field) if texts_alone else read_piece(piece, settings.field, others)
        for document in found:
            if isinstance(document, BadDocument):
                _leave_out(name, document.place, document.reason, settings, result)
                continue
            if not document.text or document.text.isspace():
                result.empty += 1
                continue
            language = str(document.field(settings.language_field) or "-") if settings.language_field else "-"
            if not _wanted(document, language, settings):
                result.filtered += 1
                continue
            yield _Wanted(f"{piece.source or name}\t{language}", document.text, name, document.place)
        result.input_bytes += piece.size


def _wanted(document: Document, language: str, settings: Settings) -> bool:
    size = len(document.text)
    if size < settings.min_characters or (settings.max_characters is not None and size > settings.max_characters):
        return False
    return not settings.languages or language in settings.languages


@dataclass(frozen=True)
class ShardTask:
    """One shard of the manifest, with all that decides its tokens."""

    number: int
    pieces: tuple[Piece, ...]
    settings: Settings
    folder: str
    most: int | None = None
    """Documents of it that are wanted."""

    @property
    def label(self) -> str:
        """What errors call it."""
        return self.pieces[0].label


_tokenizers: dict[Settings, Tokenizer] = {}  # of this process


def encode_shard(task: ShardTask) -> ShardResult:
    """`tokenize_shard` as a stage: in any process, with the library that was proven where the job began."""
    if task.settings not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[task.settings] = check_tokenizer(task.settings, proven=True)
    return tokenize_shard(task.number, task.pieces, task.settings, _tokenizers[task.settings], task.folder, task.most)


class ShardRun:
    """Does the shards that the folder does not have yet; iterating gives all results in their order, each as soon as
    those before it are there, and stops when they hold `max_documents`.

    Errors: ConfigError from the tokenizer, from any shard, or if workers die again and again.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Piece]],
        settings: Settings,
        folder: str,
        engine: Engine,
        progress: Callable[[ShardResult], None] = lambda result: None,
        max_documents: int | None = None,
    ):
        self._engine, self._progress, self._most = engine, progress, max_documents
        if len(shards) > 1 or any(piece.block for shard in shards for piece in shard):
            engine.prepare(__name__)  # workers start while the tokenizer proves itself here
        tokenizer = check_tokenizer(settings)
        texts = list(_first_texts(shards, settings))
        tokenizer.prove(texts)
        self.round_trips, self.rejected = try_round_trips(tokenizer, texts), dict(tokenizer.rejected)
        settings = replace(settings, backend=tokenizer.choose_backend())
        self.vocab_size, self.backend = tokenizer.vocab_size, tokenizer.backend
        _tokenizers.clear()
        _tokenizers[settings] = tokenizer
        self._shards, self._settings, self._folder = shards, settings, folder
        self._done: dict[int, ShardResult] = {}
        self._pieces: dict[int, tuple[Piece, ...]] = {}  # of the shards that have begun

    def _task(self, number: int, most: int | None) -> ShardTask:
        return ShardTask(number, self._pieces[number], self._settings, self._folder, most)

    def _manifest(self) -> Iterator[tuple[int, tuple[Piece, ...], ShardResult | None]]:
        """(number, pieces, its result if an interrupted run left that) of every shard; a block is there when it comes."""
        number = 0
        for shard in self._shards:
            if not shard[0].block:
                yield number, tuple(shard), _finished(self._folder, number)
                number += 1
                continue
            with contextlib.closing(Blocks(shard[0], shard[0].block)) as blocks:
                while True:
                    found = _finished(self._folder, number)
                    unneeded = found is not None and self._most is None  # else it may have to be cut short
                    block = blocks.next(None if unneeded else self._block(number))
                    if block is None:
                        break
                    yield number, (block,), found
                    number += 1

    def _tasks(self) -> Iterator[ShardTask]:
        for number, pieces, found in self._manifest():
            self._pieces[number] = pieces
            if found is None:
                yield self._task(number, self._most)
            else:
                self._done[number] = found
                self._progress(found)

    def __iter__(self) -> Iterator[ShardResult]:
        following, left = 0, sys.maxsize if self._most is None else self._most
        try:
            with contextlib.closing(self._engine.map(encode_shard, self._tasks())) as coming:  # type: ignore[type-var]
                for result in itertools.chain(coming, [None]):
                    if result is not None:
                        self._done[result.shard] = result
                        self._progress(result)
                    while left and following in self._done:
                        found = self._done.pop(following)
                        if found.documents > left:  # it could not know how many come before it
                            found = encode_shard(self._task(following, left))
                        yield found
                        self._forget(following)
                        left -= found.documents
                        following += 1
                    if not left:
                        return
        finally:
            for number in list(self._pieces):
                self._forget(number)

    def _forget(self, number: int) -> None:
        """The shard will not be asked for again: a block of it goes."""
        for piece in self._pieces.pop(number):
            if piece.path.startswith(self._block(number)):
                os.unlink(piece.path)

    def _block(self, number: int) -> str:
        return os.path.join(self._folder, f"{number:06d}.block")


def _finished(folder: str, number: int) -> ShardResult | None:
    try:
        with open(os.path.join(folder, f"{number:06d}.json"), encoding="utf-8") as file:
            content = json.load(file)
        tallies = {key: Tally(**tally) for key, tally in content["tallies"].items()}
        result = ShardResult(**{**content, "tallies": tallies, "losses": Losses(**content["losses"])})
        lengths = os.path.getsize(os.path.join(folder, f"{number:06d}.lengths"))
        tokens = LocalFile(os.path.join(folder, f"{number:06d}.tokens"))
        # The size alone says nothing after a power failure.
        checksum = xxhash.xxh3_64(tokens.read(0, tokens.size).data).hexdigest()
    except (ConfigError, OSError, ValueError, TypeError, KeyError):
        return None
    return result if lengths == 8 * result.documents and checksum == result.checksum else None


def _first_texts(
    shards: Sequence[Sequence[Piece]], settings: Settings, characters: int = PROOF_CHARACTERS
) -> Iterable[str]:
    """The beginning of the first, middle and last shard: the sample on which a fast tokenizer must prove itself."""
    for number in sorted({0, len(shards) // 2, len(shards) - 1} & set(range(len(shards)))):
        left = characters
        for piece in shards[number]:
            for document in read_piece(piece, settings.field, ()):
                if isinstance(document, Document) and left > 0:
                    yield document.text[:left]
                    left -= len(document.text)
                elif left <= 0:
                    break
            if left <= 0:
                break
