"""What every way of deduplication shares: numbered documents from files, and a kept and a removed list."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.config.errors import ConfigError
from megalm.data.documents import BadDocument, Document, cut_into_pieces, find_files, read_piece

BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Removal:
    """Why a document went: the number of the one that stays (None for evaluation text), and words on it."""

    of: int | None
    why: str


@dataclass(frozen=True)
class Counts:
    """How many documents there were, how many stay, and how many could not be read."""

    documents: int
    removed: int
    bad: int


class Corpus:
    """The documents of files, numbered in the order of the files; read as often as needed, never held in memory.

    Errors: ConfigError for a document that cannot be read, unless `skip_bad`, when it is counted and has no number.
    """

    def __init__(self, inputs: Sequence[str], field: str = "text", skip_bad: bool = False):
        self.pieces = cut_into_pieces(find_files(list(inputs)))
        self.field, self.skip_bad = field, skip_bad
        self.bad = 0

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        """(file, document)"""
        self.bad = 0
        for piece in self.pieces:
            for document in read_piece(piece, self.field):
                if isinstance(document, BadDocument):
                    if not self.skip_bad:
                        raise ConfigError(
                            f"{piece.path}: {document.place}: {document.reason}. Mend it, or pass --skip-bad to leave such out."
                        )
                    self.bad += 1
                else:
                    yield piece.path, document

    def batches(self) -> Iterator[list[str]]:
        """The texts, some megabytes at a time."""
        texts: list[str] = []
        held = 0
        for _, document in self:
            texts.append(document.text)
            held += len(document.text)
            if held >= BATCH_CHARACTERS:
                yield texts
                texts, held = [], 0
        if texts:
            yield texts


def write_lists(corpus: Corpus, removals: dict[int, Removal], output: str | None, removed: str | None) -> Counts:
    """Reads the corpus once more, and writes the documents that stay and the list of those that do not, with the reason.

    A kept document is written with all its fields; a removed one by its place, and the place of the one that it duplicates.
    """
    originals = {removal.of for removal in removals.values()}
    places: dict[int | None, dict[str, str]] = {}
    names = [name for name in (output, removed) if name]
    files: dict[str, Any] = {name: open(name + ".partial", "w", encoding="utf-8") for name in names}  # noqa: SIM115
    documents = gone = 0
    try:
        for number, (path, document) in enumerate(corpus):
            documents += 1
            if number in originals:
                places[number] = {"file": path, "place": document.place}
            removal = removals.get(number)
            if removal is None:
                if output:
                    record = document.fields if document.fields else {"text": document.text}
                    files[output].write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
                continue
            gone += 1
            if removed:
                entry = {"file": path, "place": document.place, "number": number, "why": removal.why}
                if removal.of is not None:
                    entry |= {"duplicate_of": {"number": removal.of, **places.get(removal.of, {})}}
                files[removed].write(json.dumps(entry, ensure_ascii=False) + "\n")
    finally:
        for file in files.values():
            file.close()
    for name in files:
        os.replace(name + ".partial", name)
    return Counts(documents, gone, corpus.bad)
