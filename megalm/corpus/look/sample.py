"""A sample of a corpus of any size: a few blocks of every source, and of these as many documents as are wanted.

A document belongs to the block in which it begins. So of blocks that are chosen at random every document is as likely as any
other, short or long, and the number of all documents follows from how many begin in the bytes that were read.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from megalm.config.data import DataConfig
from megalm.config.errors import ConfigError
from megalm.corpus.documents import BadDocument, Document, Piece, cut_into_pieces, find_files, read_piece
from megalm.corpus.fields import look_up_value
from megalm.corpus.files import LINE_ENDINGS, find_ending
from megalm.corpus.look.labels import make_key
from megalm.data.look import find_tokenizer, list_document_inputs
from megalm.data.openers import open_tokens
from megalm.tokenizer.tokenizer import Tokenizer, load_tokenizer

BLOCK = 1 << 14  # bytes of JSON lines that are read together
READ = 8 << 20  # bytes that all sources together have read, and each at least LEAST_READ
LEAST_READ = 1 << 18
UNITS = 24  # blocks or files of a source, at least, unless it has fewer
OF_A_UNIT = 2000  # documents at most
MOST_UNITS = 100_000  # beyond so many blocks they are drawn one by one
TOKENS = 4000  # of a document of a token file that are decoded


@dataclass(frozen=True)
class Seen:
    """A document of the sample."""

    key: str
    """Of its text (`make_key`): the same wherever the document lies."""
    source: int
    place: str
    """File and place in it."""
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    tokens: int = -1
    """Of a token file."""


@dataclass(frozen=True)
class Source:
    """What of the corpus is looked at by itself."""

    name: str
    bytes: int
    documents: int
    """How many there are, or about how many."""
    exact: bool
    """Whether all of it was read."""
    begins_only: bool = False
    """Whether of its files, which can be read from their beginning only, no more than that was read."""


@dataclass(frozen=True)
class Sample:
    """Documents, in the order of their sources, and what could not be read among them."""

    name: str
    sources: list[Source]
    documents: list[Seen]
    bad: list[str]
    files: tuple[Piece, ...] = ()
    """Of raw texts, as they were when they were found."""

    @property
    def documents_there(self) -> int:
        """Documents of the whole corpus, or about so many."""
        return sum(source.documents for source in self.sources)


def sample_corpus(
    inputs: Sequence[str], count: int, seed: int = 0, text_field: str = "text", by: str = "", tokenizer: str = ""
) -> Sample:
    """About `count` documents of texts or token files; the same inputs and seed give the same ones.

    by: a field of the documents that names their source; without it a source is an input, or, of one folder, what lies in it.
    Errors: ConfigError for an input that is not there, cannot be read, or has no document.
    """
    if count < 1:
        raise ConfigError(f"a sample of {count} documents shows nothing: give at least 1.")
    tokens = [is_token_file(path) for path in inputs]
    if any(tokens) and not all(tokens):
        raise ConfigError(
            f"{inputs[tokens.index(True)]} is a token file and {inputs[tokens.index(False)]} is not: look at them one by one."
        )
    sample = (
        _sample_tokens(inputs, count, seed, tokenizer)
        if any(tokens)
        else _sample_texts(inputs, count, seed, text_field)
    )
    if not sample.documents:
        wrong = f" ({sample.bad[0]})" if sample.bad else ""
        raise ConfigError(f"{sample.name}: no document could be read{wrong}.")
    return _regroup(sample, by) if by else sample


def is_token_file(path: str) -> bool:
    """Whether it is a .bin/.idx pair, by its prefix or one of its files, or a folder of MDS shards of tokens."""
    stem = path[:-4] if path.endswith((".bin", ".idx")) else path
    if any(os.path.exists(f"{stem}{end}.idx") for end in ("", "_text_document")):
        return True
    index = os.path.join(path, "index.json")
    if not os.path.isfile(index):
        return False
    try:
        open_tokens(path, DataConfig())
    except ConfigError:
        return False
    return True


def _sample_texts(inputs: Sequence[str], count: int, seed: int, text_field: str) -> Sample:
    files = find_files(inputs)
    names = _name_sources(inputs, files)
    total = max(sum(file.size for file in files), 1)
    sources, documents, bad = [], [], []
    random = np.random.default_rng(seed)
    grouped: dict[str, list[Piece]] = {}
    for name, file in zip(names, files, strict=True):
        grouped.setdefault(name, []).append(file)
    for number, (name, own) in enumerate(grouped.items()):
        share = sum(file.size for file in own) / total
        wanted = max(
            1, round(count * (share + 1 / len(grouped)) / 2)
        )  # half by size, half alike: small ones are seen too
        source, found, wrong = _sample_source(name, own, wanted, share, random, text_field)
        sources.append(source)
        documents += [_see(document, piece, number) for piece, document in found]
        bad += [f"{piece.label}: {one.place}: {one.reason}" for piece, one in wrong]
    return Sample(", ".join(inputs), sources, documents, bad, tuple(files))


def _name_sources(inputs: Sequence[str], files: Sequence[Piece]) -> list[str]:
    """Of each file the source that it is of."""
    if len({file.source for file in files}) > 1:
        return [file.source for file in files]
    root = inputs[0].rstrip("/") + "/"
    if not all(file.path.startswith(root) for file in files):
        return [os.path.basename(file.path) if len(files) < 30 else inputs[0] for file in files]
    folders = [file.path[len(root) :].split("/")[0] for file in files]
    return folders if len(set(folders)) <= 30 else [inputs[0]] * len(files)


_Found = tuple[Piece, Document]
_Wrong = tuple[Piece, BadDocument]


def _sample_source(
    name: str, files: list[Piece], wanted: int, share: float, random: np.random.Generator, text_field: str
) -> tuple[Source, list[_Found], list[_Wrong]]:
    size = sum(file.size for file in files)
    budget = max(int(READ * share), LEAST_READ)
    units = _Units(cut_into_pieces(files), size > budget)
    found: list[_Found] = []
    wrong: list[_Wrong] = []
    read = visited = 0
    whole = True
    for piece in units.draw(random):
        before, given = len(found), 0
        for one in islice(read_piece(piece, text_field), OF_A_UNIT):
            given += 1
            if isinstance(one, BadDocument):
                wrong.append((piece, one))
            else:
                found.append((piece, one))
        visited += 1
        if given == OF_A_UNIT and piece.size > BLOCK:
            whole = False  # there is more of it: its size is that of what was read
            read += min(sum(len(one.text) for _, one in found[before:]), piece.size)
        else:
            read += piece.size
        if size > budget and visited >= UNITS and (read >= 4 * budget or (read >= budget and len(found) >= wanted)):
            break
    exact = whole and visited == len(units)
    there = len(found) if exact else max(len(found), round(len(found) * size / max(read, 1)))
    chosen = np.sort(random.permutation(len(found))[:wanted])
    return Source(name, size, there, exact, not whole), [found[place] for place in chosen.tolist()], wrong


class _Units:
    """The blocks and files of a source, to be visited in any order."""

    def __init__(self, pieces: Sequence[Piece], in_blocks: bool):
        self._pieces = pieces
        blocks = [
            max(1, -(-piece.size // BLOCK))
            if in_blocks and piece.plain and piece.stop >= 0 and find_ending(piece.path) in LINE_ENDINGS
            else 1
            for piece in pieces
        ]
        self._ends = np.cumsum(blocks).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def draw(self, random: np.random.Generator) -> Iterator[Piece]:
        """Draw each once, by chance."""
        if len(self) <= MOST_UNITS:
            yield from map(self._at, random.permutation(len(self)).tolist())
            return
        seen: set[int] = set()
        while len(seen) < MOST_UNITS:
            for number in random.integers(len(self), size=256).tolist():
                if number not in seen:
                    seen.add(number)
                    yield self._at(number)

    def _at(self, number: int) -> Piece:
        which = bisect_right(self._ends, number)
        piece, first = self._pieces[which], self._ends[which - 1] if which else 0
        if self._ends[which] - first == 1:
            return piece
        start = piece.start + (number - first) * BLOCK
        stop = min(start + BLOCK, piece.stop)
        return replace(piece, start=start, stop=stop, size=stop - start)


def _see(document: Document, piece: Piece, source: int) -> Seen:
    return Seen(make_key(document.text), source, f"{piece.label}: {document.place}", document.text, document.fields)


def _sample_tokens(inputs: Sequence[str], count: int, seed: int, tokenizer: str) -> Sample:
    given = load_tokenizer(tokenizer) if tokenizer else None
    sources: list[Source] = []
    documents: list[Seen] = []
    random = np.random.default_rng(seed)
    for path in inputs:
        file = open_tokens(path, DataConfig())
        speaks = given or find_tokenizer(file.prefix)
        parts = list_document_inputs(file.prefix, file.num_documents) or [(0, path)]
        starts = [first for first, _ in parts]
        for (first, name), stop in zip(parts, [*starts[1:], file.num_documents], strict=True):
            size = (file.document_start(stop) - file.document_start(first)) * file.dtype.itemsize
            share = (stop - first) / file.num_documents / len(inputs)
            wanted = max(1, round(count * (share + 1 / len(parts) / len(inputs)) / 2))
            chosen = np.unique(random.integers(first, stop, size=4 * wanted)) if stop - first > 4 * wanted else None
            own = np.arange(first, stop) if chosen is None else chosen
            own = np.sort(random.permutation(own)[:wanted])
            for number in own.tolist():
                ids = file.document(number)
                text = _decode(speaks, ids[:TOKENS])
                place = f"{file.prefix}: document {number}"
                documents.append(Seen(make_key(text), len(sources), place, text, tokens=len(ids)))
            sources.append(Source(name, size, stop - first, True))
    return Sample(", ".join(inputs), sources, documents, [])


def _decode(tokenizer: Tokenizer | None, ids: np.ndarray) -> str:
    listed = np.asarray(ids).tolist()
    return tokenizer.decode(listed) if tokenizer else " ".join(map(str, listed))


def _regroup(sample: Sample, by: str) -> Sample:
    """The same documents with sources by a field; their sizes are estimated from the sample."""
    named = [look_up_value(document.fields, by) for document in sample.documents]
    if all(value is None for value in named):
        raise ConfigError(f"--by {by}: no document of the sample has this field.")
    names = sorted({"(none)" if value is None else str(value) for value in named})
    place = {name: number for number, name in enumerate(names)}
    there = np.array([source.documents for source in sample.sources], float)
    sampled = np.bincount([document.source for document in sample.documents], minlength=len(there))
    weight = there / np.maximum(sampled, 1)
    documents = [
        replace(document, source=place["(none)" if value is None else str(value)])
        for document, value in zip(sample.documents, named, strict=True)
    ]
    counts, sizes = np.zeros(len(names)), np.zeros(len(names))
    for before, after in zip(sample.documents, documents, strict=True):
        counts[after.source] += weight[before.source]
        sizes[after.source] += weight[before.source] * len(after.text)
    rows = zip(names, sizes.tolist(), counts.tolist(), strict=True)
    return replace(sample, sources=[Source(n, round(s), round(c), False) for n, s, c in rows], documents=documents)
