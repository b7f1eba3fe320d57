"""The documents of a shard, some megabytes at a time, with all that is needed to write them again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import BATCH_CHARACTERS, BATCH_TEXTS, CorpusShard, explain_read_errors
from megalm.corpus.dedup.places import make_bad_record
from megalm.corpus.dedup.removal import write_json_row
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.documents import BOM, BadDocument, Document, Piece, read_piece
from megalm.corpus.fields import replace_text
from megalm.corpus.json_lines import Lines, holds_lines, read_lines


@dataclass(frozen=True)
class Documents:
    """Some documents of a file, and what could not be read between them (with the number of the batch's before it)."""

    piece: Piece
    number: int
    """Of the piece in the shard."""
    texts: Texts
    bad: list[tuple[int, BadDocument]]
    field_name: str
    lines: Lines | None = None
    whole: list[Document] = field(default_factory=list)
    """Where there are no lines."""

    @cached_property
    def fields(self) -> list[dict[str, Any]]:
        """All fields of every document."""
        if self.lines is None:
            return [document.fields for document in self.whole]
        return [self.record(number) for number in range(len(self.texts))]

    def record(self, number: int) -> dict[str, Any]:
        """The fields of a document; a text alone becomes one."""
        if self.lines is None:
            return self.whole[number].fields or {"text": self.whole[number].text}
        record = json.loads(self.lines.line(number).removeprefix(BOM))
        return record if isinstance(record, dict) else {"text": record}

    def place(self, number: int) -> str:
        """Where the document lies in its file."""
        return self.whole[number].place if self.lines is None else f"byte {int(self.lines.begins[number])}"

    def write(self, number: int, text: str | None, column: str, mark: bytes) -> bytes:
        """The document as a line of JSON: with another text, if there is one, and with a further key, if it has a name. A
        line that needs no other text stays as it is but for that key."""
        if self.lines is not None and text is None:
            line = self.lines.line(number).removeprefix(BOM).strip()
            if line.startswith(b"{") and (not column or json.dumps(column).encode() not in line):
                if not column:
                    return line + b"\n"
                head = line[:-1].rstrip()
                comma = b"" if head.endswith(b"{") else b", "
                return b"%s%s%s: %s}\n" % (head, comma, json.dumps(column).encode(), mark)
        record = self.record(number)
        if text is not None:
            record = replace_text(record, self.field_name if self._has_field(record) else "text", text)
        if column:
            record = {**record, column: json.loads(mark)}
        return write_json_row(record)

    def _has_field(self, record: dict[str, Any]) -> bool:
        """Whether the text came from the field that was asked for, and not from a file or line of text alone."""
        return not (set(record) == {"text"} and self.field_name.split(".")[0] != "text")


def read_documents(shard: CorpusShard, needs_fields: bool) -> Iterator[Documents]:
    """Read the documents of all pieces of a shard.

    Errors: ConfigError at a document that cannot be read, unless the shard leaves out what is bad.
    """
    for number, piece in enumerate(shard.pieces):
        parts = _lines(piece, number, shard) if holds_lines(piece) else _others(piece, number, shard, needs_fields)
        for documents in explain_read_errors(parts, piece):
            if documents.bad and not shard.skip_bad:
                wrong = documents.bad[0][1]
                raise ConfigError(
                    f"{piece.label}: {wrong.place}: {wrong.reason}. Mend it, or pass --skip-bad to leave such out."
                )
            yield documents


def _lines(piece: Piece, number: int, shard: CorpusShard) -> Iterator[Documents]:
    for lines in read_lines(piece, shard.field):
        texts = Texts(lines.data, lines.ends, lines.ascii)
        yield Documents(piece, number, texts, lines.bad, shard.field, lines)


def _others(piece: Piece, number: int, shard: CorpusShard, needs_fields: bool) -> Iterator[Documents]:
    documents: list[Document] = []
    bad: list[tuple[int, BadDocument]] = []
    held = 0
    for found in read_piece(piece, shard.field):
        if isinstance(found, BadDocument):
            bad.append((len(documents), found))
            if not shard.skip_bad:
                break
            continue
        documents.append(found)
        held += len(found.text)
        if held >= BATCH_CHARACTERS or len(documents) == BATCH_TEXTS:
            yield _batch(piece, number, documents, bad, shard.field)
            documents, bad, held = [], [], 0
    if documents or bad:
        yield _batch(piece, number, documents, bad, shard.field)


def _batch(
    piece: Piece, number: int, documents: list[Document], bad: list[tuple[int, BadDocument]], name: str
) -> Documents:
    texts = Texts.of(document.text for document in documents)
    return Documents(piece, number, texts, bad, name, whole=documents)


def make_bad_records(documents: Documents, before: int) -> list[list[Any]]:
    """What could not be read, as a shard's file `bad` has it; `before`: the shard's documents before this batch."""
    return [make_bad_record(documents.number, before + number, found) for number, found in documents.bad]
