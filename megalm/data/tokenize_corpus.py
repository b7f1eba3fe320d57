"""From documents to a token file: a manifest of shards, a pure function over shards, and a merge in the manifest's
order.

A shard is a list of pieces that depends only on the input; its tokens are written aside under its number and renamed
when whole. So the result does not depend on the number of workers, an interrupted run goes on where it was, and a
lost worker costs its shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.documents import BadDocument, Document, Piece, read_piece
from megalm.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megalm.data.tokens import TokenWriter, token_dtype

SHARD_BYTES = 16 << 20
SHARD_PIECES = 512
BATCH_CHARACTERS = 1 << 21  # encoded at a time: bounds the memory of a worker
ATTEMPTS = 3  # of a shard whose worker died
MERGED_DOCUMENTS = 4096  # at a time
LISTED = 1000  # skipped documents named in the report; all are counted


@dataclass(frozen=True)
class Settings:
    """Everything besides the input that decides the tokens."""

    tokenizer: str
    field: str = "text"
    append_eos: bool = True
    prepend_bos: bool = False
    eos: str | None = None
    """Name of the end-of-document token; None: the tokenizer's own."""
    min_characters: int = 1
    max_characters: int | None = None
    language_field: str | None = None
    languages: tuple[str, ...] = ()
    skip_bad: bool = False
    backend: str = "auto"
    tiktoken_pattern: str | None = None


@dataclass
class Tally:
    """What went through, for one source and one language."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0

    def add(self, other: Tally) -> None:
        """Adds another one to this."""
        self.documents += other.documents
        self.characters += other.characters
        self.bytes += other.bytes
        self.tokens += other.tokens


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


def make_shards(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Consecutive pieces, up to SHARD_BYTES and SHARD_PIECES together."""
    shards: list[list[Piece]] = []
    held = SHARD_BYTES
    for piece in pieces:
        if held + piece.size > SHARD_BYTES or len(shards[-1]) >= SHARD_PIECES:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.size
    return shards


def check_tokenizer(settings: Settings) -> Tokenizer:
    """Loads it and makes sure that it has the control tokens that are asked for.

    Errors: ConfigError naming the token that is missing.
    """
    tokenizer = load_tokenizer(settings.tokenizer, backend=settings.backend, tiktoken_pattern=settings.tiktoken_pattern)
    if settings.eos is not None:
        tokenizer.eos_id = tokenizer.token_id(settings.eos)
    if settings.append_eos and tokenizer.eos_id is None:
        raise ConfigError(
            f"{settings.tokenizer} has no end-of-document "
            f"token{f' {settings.eos!r}' if settings.eos else ' that is known'}: "
            "name one with --eos TOKEN, or write documents without an end by --no-eos."
        )
    if settings.prepend_bos and tokenizer.bos_id is None:
        raise ConfigError(f"{settings.tokenizer} has no begin-of-document token: leave out --bos.")
    return tokenizer


def tokenize_shard(
    number: int, pieces: Sequence[Piece], settings: Settings, tokenizer: Tokenizer, folder: str
) -> ShardResult:
    """Encodes the shard's documents in order and leaves `NUMBER.tokens`, `NUMBER.lengths`, `NUMBER.json` in the
    folder."""
    result = ShardResult(number)
    dtype = token_dtype(tokenizer.vocab_size)
    paths = {part: os.path.join(folder, f"{number:06d}.{part}") for part in ("tokens", "lengths", "json")}
    with open(paths["tokens"] + ".partial", "wb") as tokens, open(paths["lengths"] + ".partial", "wb") as lengths:
        for keys, texts in _batches(pieces, settings, result):
            encoded = []
            for key, text, ids in zip(keys, texts, tokenizer.encode_batch(texts), strict=True):
                ids = _with_ends(ids, settings, tokenizer)
                encoded.append(ids)
                tally = result.tallies.setdefault(key, Tally())
                tally.add(Tally(1, len(text), len(text.encode()), len(ids)))
            stream = np.concatenate(encoded)
            if len(stream) and int(stream.max()) >= tokenizer.vocab_size:
                raise ConfigError(
                    f"{settings.tokenizer}: made the token {stream.max()}, beyond its {tokenizer.vocab_size}."
                )
            tokens.write(stream.astype(dtype).data)
            lengths.write(np.array([len(ids) for ids in encoded], "<i8").data)
            result.documents += len(encoded)
            result.tokens += len(stream)
    for part in ("tokens", "lengths"):
        os.replace(paths[part] + ".partial", paths[part])
    with open(paths["json"] + ".partial", "w", encoding="utf-8") as file:
        json.dump(asdict(result), file)
    os.replace(paths["json"] + ".partial", paths["json"])
    return result


def _with_ends(ids: np.ndarray, settings: Settings, tokenizer: Tokenizer) -> np.ndarray:
    before = [tokenizer.bos_id] if settings.prepend_bos else []
    after = [tokenizer.eos_id] if settings.append_eos else []
    return np.concatenate((np.array(before, np.int64), ids, np.array(after, np.int64))).astype(np.int64)


def _batches(pieces: Sequence[Piece], settings: Settings, result: ShardResult) -> Iterator[tuple[list[str], list[str]]]:
    keys: list[str] = []
    texts: list[str] = []
    held = 0
    for piece in pieces:
        name = piece.name or piece.path
        for document in read_piece(piece, settings.field):
            if isinstance(document, BadDocument):
                if not settings.skip_bad:
                    raise ConfigError(
                        f"{name}: {document.place}: {document.reason}. Mend the document, or pass --skip-bad to "
                        f"leave out and list "
                        "such ones."
                    )
                result.bad += 1
                if len(result.listed) < LISTED:
                    result.listed.append(f"{name}: {document.place}: {document.reason}")
                continue
            size = len(document.text)
            if not document.text.strip():
                result.empty += 1
                continue
            language = str(document.fields.get(settings.language_field, "-")) if settings.language_field else "-"
            if not _wanted(document, language, settings):
                result.filtered += 1
                continue
            keys.append(f"{piece.source or name}\t{language}")
            texts.append(document.text)
            held += size
            if held >= BATCH_CHARACTERS:
                yield keys, texts
                keys, texts, held = [], [], 0
        result.input_bytes += piece.size
    if texts:
        yield keys, texts


def _wanted(document: Document, language: str, settings: Settings) -> bool:
    size = len(document.text)
    if size < settings.min_characters or (settings.max_characters is not None and size > settings.max_characters):
        return False
    return not settings.languages or language in settings.languages


_worker: tuple[Settings, Tokenizer] | None = None


def _start_worker(settings: Settings, backend: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (settings, check_tokenizer(replace_backend(settings, backend)))


def replace_backend(settings: Settings, backend: str) -> Settings:
    """The settings with the library that has proven itself; the libraries of other formats have no choice of one."""
    return Settings(
        **{
            **asdict(settings),
            "languages": settings.languages,
            "backend": backend if backend != "sentencepiece" else "auto",
        }
    )


def _work(number: int, pieces: Sequence[Piece], folder: str) -> ShardResult:
    assert _worker is not None
    return tokenize_shard(number, pieces, *_worker, folder)


def run_shards(
    shards: Sequence[Sequence[Piece]],
    settings: Settings,
    folder: str,
    workers: int,
    progress: Callable[[ShardResult], None] = lambda result: None,
) -> list[ShardResult]:
    """Does the shards that the folder does not have yet, and returns all results in order.

    Errors: ConfigError from any shard; also if workers die again and again.
    """
    tokenizer = check_tokenizer(settings)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.prove(_first_texts(shards, settings))
    done = {number: result for number in range(len(shards)) if (result := _finished(folder, number)) is not None}
    for result in done.values():
        progress(result)
    missing = [number for number in range(len(shards)) if number not in done]
    if workers <= 1 or len(missing) <= 1:
        for number in missing:
            done[number] = tokenize_shard(number, shards[number], settings, tokenizer, folder)
            progress(done[number])
    else:
        for attempt in range(ATTEMPTS):
            try:
                for result in _pooled(
                    missing, shards, settings, tokenizer.choose_backend(), folder, min(workers, len(missing))
                ):
                    done[result.shard] = result
                    progress(result)
                break
            except BrokenProcessPool as error:
                missing = [number for number in missing if number not in done]
                if attempt + 1 == ATTEMPTS:
                    names = ", ".join(sorted({p.name or p.path for n in missing[: workers * 2] for p in shards[n][:1]}))
                    raise ConfigError(
                        f"a worker process was killed {ATTEMPTS} times, at shards that begin with {names}. The "
                        f"machine may be out of "
                        "memory: pass fewer --workers; what is done is kept, and the same command goes on from there."
                    ) from error
    return [done[number] for number in range(len(shards))]


def _pooled(
    missing: Sequence[int],
    shards: Sequence[Sequence[Piece]],
    settings: Settings,
    backend: str,
    folder: str,
    workers: int,
) -> Iterator[ShardResult]:
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(settings, backend)
    ) as pool:
        try:
            queue = iter(missing)
            running = {
                pool.submit(_work, n, shards[n], folder) for _, n in zip(range(2 * workers), queue, strict=False)
            }
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                    following = next(queue, None)
                    if following is not None:
                        running.add(pool.submit(_work, following, shards[following], folder))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _finished(folder: str, number: int) -> ShardResult | None:
    try:
        with open(os.path.join(folder, f"{number:06d}.json"), encoding="utf-8") as file:
            content = json.load(file)
        result = ShardResult(**{**content, "tallies": {k: Tally(**v) for k, v in content["tallies"].items()}})
        lengths = os.path.getsize(os.path.join(folder, f"{number:06d}.lengths"))
        tokens = os.path.getsize(os.path.join(folder, f"{number:06d}.tokens"))
    except (OSError, ValueError, TypeError):
        return None
    whole = lengths == 8 * result.documents and tokens in (2 * result.tokens, 4 * result.tokens)
    return result if whole else None


def _first_texts(shards: Sequence[Sequence[Piece]], settings: Settings, characters: int = 1 << 18) -> Iterable[str]:
    """The beginning of the first, middle and last shard: the sample on which a fast tokenizer must prove itself."""
    for number in sorted({0, len(shards) // 2, len(shards) - 1} & set(range(len(shards)))):
        left = characters
        for piece in shards[number]:
            for document in read_piece(piece, settings.field):
                if isinstance(document, Document) and left > 0:
                    yield document.text[: 1 << 16]
                    left -= len(document.text)
                elif left <= 0:
                    break
            if left <= 0:
                break


def merge(
    folder: str, results: Sequence[ShardResult], prefix: str, vocab_size: int, max_documents: int | None = None
) -> None:
    """Joins the shards' files in order into PREFIX.bin and PREFIX.idx; memory does not grow with their size."""
    dtype = token_dtype(vocab_size)
    left = max_documents if max_documents is not None else sum(result.documents for result in results)
    with TokenWriter(prefix, dtype) as writer:
        for result in results:
            stem = os.path.join(folder, f"{result.shard:06d}")
            with open(stem + ".tokens", "rb") as tokens, open(stem + ".lengths", "rb") as lengths:
                while left > 0 and len(chunk := np.fromfile(lengths, "<i8", min(left, MERGED_DOCUMENTS))):
                    left -= len(chunk)
                    writer.add_documents(np.fromfile(tokens, dtype, int(chunk.sum())), chunk)


def digest(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def prepare_folder(folder: str, recipe: dict[str, Any]) -> bool:
    """Makes the folder for shards; one left by an interrupted run of the same recipe is kept (True), any other is
    emptied."""
    mark = Path(folder, "recipe")
    if mark.exists() and mark.read_text() == digest(recipe):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    mark.write_text(digest(recipe))
    return False
