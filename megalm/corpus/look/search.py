"""Looks for words in all documents of a corpus, block by block; an index leaves out the blocks that cannot have them.

The index is a filter of BITS bits for each block: one bit for each of its words, by the word's hash (Bloom 1970, one hash). A
block is read only if the bits of all words that are looked for are set, so a rare word costs one look at a byte of each block,
and few reads. It also counts the documents.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.shingles import make_shingles
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.documents import BadDocument, Piece, cut_into_pieces, read_piece
from megalm.corpus.files import LINE_ENDINGS, find_ending
from megalm.corpus.json_lines import holds_lines, read_lines
from megalm.corpus.look.labels import make_key
from megalm.corpus.look.sample import Seen
from megalm.corpus.shards import check_unchanged, hash_json, stamp_files

BLOCK = 1 << 18  # bytes of JSON lines of one filter
BITS = 1 << 17
FOUND = 50  # documents that a search gives
SECONDS = 10.0  # after which it gives what it has
SHOWN = 4000  # characters of a text


@dataclass(frozen=True)
class Progress:
    """How far the index is."""

    blocks: int
    done: int
    documents: int


class Search:
    """Searches files of texts. `folder`: where the index is kept, or is to be; None: every search reads everything.

    Errors: ConfigError for files that changed since, or an index that cannot be written.
    """

    def __init__(self, files: Sequence[Piece], text_field: str, folder: str | None):
        self._files, self._field = files, text_field
        self._blocks = cut_into_blocks(files)
        self._stamp = hash_json([stamp_files(files), text_field, BLOCK, BITS])
        self._folder = Path(folder) if folder else None
        self._lock = threading.Lock()
        self._done = self._documents = 0
        self._filters: np.ndarray | None = None
        self.shown: dict[str, Seen] = {}
        """What searches have found, by key: it can be labelled."""
        if self._folder is not None:
            self._open(self._folder)

    @property
    def progress(self) -> Progress:
        """How many blocks the index knows."""
        return Progress(len(self._blocks), self._done, self._documents)

    def _open(self, folder: Path) -> None:
        """Maps the filters; those of other files, or of an older state of these, are begun anew."""
        note, path = folder / "index.json", folder / "words.filters"
        size = len(self._blocks) * BITS // 8
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = json.loads(note.read_text()) if note.exists() else {}
            if known.get("stamp") == self._stamp and path.exists() and path.stat().st_size == size:
                self._done, self._documents = int(known["done"]), int(known["documents"])
            elif size:
                with open(path, "wb") as file:
                    file.truncate(size)
            if size:
                self._filters = np.memmap(path, np.uint8, "r+", shape=(len(self._blocks), BITS // 8))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the index {folder} cannot be used ({error}): name another folder, or remove it."
            ) from error

    def build(self, stop: threading.Event | None = None) -> None:
        """Reads what the index does not know yet; stopped, it goes on from there the next time."""
        if self._folder is None or self._filters is None:
            return
        saved = time.monotonic()
        while self._done < len(self._blocks) and not (stop and stop.is_set()):
            count = 0
            bits = np.zeros(BITS, bool)
            for texts in _read_texts(self._blocks[self._done], self._field):
                values, _ = make_shingles(texts, 1)
                bits[values >> np.uint64(64 - BITS.bit_length() + 1)] = True
                count += len(texts)
            self._filters[self._done] = np.packbits(bits, bitorder="little")
            self._done, self._documents = self._done + 1, self._documents + count
            if time.monotonic() - saved > 5:
                self._save()
                saved = time.monotonic()
        self._save()

    def _save(self) -> None:
        assert self._folder is not None and isinstance(self._filters, np.memmap)
        self._filters.flush()
        aside = self._folder / "index.json.new"
        aside.write_text(json.dumps({"stamp": self._stamp, "done": self._done, "documents": self._documents}))
        os.replace(aside, self._folder / "index.json")

    def find(self, query: str) -> dict[str, Any]:
        """Find documents with these words one after another, in any case.

        Errors: ConfigError for an empty query, or files that changed.
        """
        wanted = " ".join(query.lower().split())
        if not wanted:
            raise ConfigError("search for a word, or several as they stand in the text.")
        check_unchanged(self._files)
        started, read = time.monotonic(), 0
        rows: list[dict[str, Any]] = []
        pattern, whole = make_pattern(wanted), True
        for number in self._choose_blocks(wanted):
            if len(rows) >= FOUND or time.monotonic() - started > SECONDS:
                whole = False
                break
            read += 1
            for seen, at in self._find_in(self._blocks[number], wanted, pattern):
                begin = max(at - SHOWN // 2, 0)
                rows.append({"key": seen.key, "place": seen.place, "text": seen.text[begin : begin + SHOWN]})
                self.shown[seen.key] = seen
        return {
            "documents": rows[:FOUND],
            "complete": whole,
            "read": read,
            "blocks": len(self._blocks),
            "indexed": self.progress.done,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _choose_blocks(self, wanted: str) -> list[int]:
        """Choose the blocks whose filters have all the words, and those that no filter is of yet."""
        everything = list(range(len(self._blocks)))
        values, _ = make_shingles(Texts.of([wanted]), 1)
        if self._filters is None or len(values) == 0:
            return everything
        bits = (values >> np.uint64(64 - BITS.bit_length() + 1)).astype(np.int64)
        done = self._done
        has = np.ones(done, bool)
        for bit in bits.tolist():
            has &= (self._filters[:done, bit >> 3] >> np.uint8(bit & 7)) & 1 > 0
        return [*np.flatnonzero(has).tolist(), *everything[done:]]

    def _find_in(self, piece: Piece, wanted: str, pattern: re.Pattern[str]) -> Iterator[tuple[Seen, int]]:
        """Find the documents with the place in each."""
        longest = max(wanted.split(), key=len)
        if piece.plain and holds_lines(piece) and "://" not in piece.path and longest.isascii() and longest.isalnum():
            with open(piece.path, "rb") as file:  # one look at the bytes leaves out most blocks
                file.seek(piece.start)
                data = file.read(piece.size)
                if longest.encode() not in (data + file.readline()).lower():
                    return
        for found in read_piece(piece, self._field):
            if not isinstance(found, BadDocument) and (match := pattern.search(found.text)):
                yield Seen(make_key(found.text), 0, f"{piece.label}: {found.place}", found.text), match.start()


def make_pattern(wanted: str) -> re.Pattern[str]:
    """Whole words with any white space between them; letters of scripts without spaces may have others beside them."""
    begin, end = (r"(?<!\w)" if wanted[0].isascii() else "", r"(?!\w)" if wanted[-1].isascii() else "")
    if not (wanted[0].isalnum() or wanted[0] == "_"):
        begin = ""
    if not (wanted[-1].isalnum() or wanted[-1] == "_"):
        end = ""
    return re.compile(begin + r"\s+".join(map(re.escape, wanted.split())) + end, re.IGNORECASE)


def cut_into_blocks(files: Sequence[Piece]) -> list[Piece]:
    """The parts that are read together: of plain JSON lines BLOCK bytes, else a piece."""
    blocks: list[Piece] = []
    for piece in cut_into_pieces(files):
        if not (piece.plain and piece.stop >= 0 and find_ending(piece.path) in LINE_ENDINGS):
            blocks.append(piece)
            continue
        for start in range(piece.start, piece.stop, BLOCK):
            stop = min(start + BLOCK, piece.stop)
            blocks.append(replace(piece, start=start, stop=stop, size=stop - start))
    return blocks


def _read_texts(piece: Piece, text_field: str) -> Iterator[Texts]:
    """Read all texts of a block, what cannot be read left out."""
    if holds_lines(piece):
        for lines in read_lines(piece, text_field):
            yield Texts(lines.data, lines.ends, lines.ascii)
        return
    found = [one.text for one in read_piece(piece, text_field) if not isinstance(one, BadDocument)]
    yield Texts.of(found)
