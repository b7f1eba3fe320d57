"""A compressed file of JSON lines or text, dealt out in the order of its content: blocks of whole lines, or the parts that
a long text is cut into. One process unpacks it and leaves each block as a plain file; any process reads that.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from megalm.corpus.archives import Unreadable, read_some
from megalm.corpus.documents import Piece, cut_text, describe_damage, explain_failed_reads
from megalm.corpus.files import LINE_ENDINGS, find_ending, open_bytes

PART = 1 << 20  # bytes copied at a time


class _Nowhere(io.RawIOBase):
    """Takes what need not be written."""

    def write(self, data: Any) -> int:
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        return size or 0


class Blocks:
    """The blocks of a piece, of about `size` bytes of its content each, a part of a text each; without a size one with
    everything.

    Where the file is damaged or cut off, the last piece says so (`Piece.broken`), and its content before that is in the
    others, up to the last whole line.
    """

    def __init__(self, piece: Piece, size: int | None = None):
        self._piece, self._size = piece, size
        self._ending = find_ending(piece.path)
        self._ends = contextlib.ExitStack()
        with explain_failed_reads(piece.label):
            self._file = self._ends.enter_context(open_bytes(piece.path, piece.plain))
        self._lines = self._ending in LINE_ENDINGS
        self._parts = cut_text(self._file)
        self._at = self._consumed = 0
        self._over = False

    def next(self, stem: str | None) -> Piece | None:
        """The next block, in a file of that name and the ending that tells its format; None after the last.
        Without a name it is passed over, and nothing is written.

        Errors: ConfigError if the compressed file cannot be read.
        """
        if self._over:
            return None
        path = f"{stem}{self._ending}" if stem else ""
        partial = f"{path}.{os.getpid()}.partial"
        with explain_failed_reads(self._piece.label), open(partial, "wb") if stem else _Nowhere() as target:
            try:
                size = self._copy_lines(target) if self._lines else self._copy_text(target)  # type: ignore[arg-type]
            except Unreadable as error:
                size, wrong = 0, describe_damage(error)
                block: Piece | None = replace(self._piece_of("", 0), broken=(wrong.place, wrong.reason))
            else:
                block = self._piece_of(path, size) if size or self._at == 0 else None
        self._over = size == 0
        if stem and block is not None and block.path:
            os.replace(partial, path)
        elif stem:
            os.unlink(partial)
        return block

    def _piece_of(self, path: str, size: int) -> Piece:
        """The piece for the next `size` bytes; its own size is that of what they were unpacked from."""
        consumed = min(self._file.raw.consumed, self._piece.size)  # type: ignore[attr-defined]
        taken, self._consumed = consumed - self._consumed, consumed
        base, self._at = self._at, self._at + size
        return replace(self._piece, path=path, size=taken, name=self._piece.label, base=base, block=0, plain=True)

    def _copy_lines(self, target: BinaryIO) -> int:
        """Whole lines, and how many bytes; of a damaged file those before the damage."""
        size = whole = 0
        most = self._size or sys.maxsize
        try:
            while size < most and (part := read_some(self._file, min(PART, most - size))):
                target.write(part)
                whole = size + part.rindex(b"\n") + 1 if b"\n" in part else whole
                size += len(part)
            while whole < size and (part := self._file.readline(PART)):
                target.write(part)
                size += len(part)
                whole = size if part.endswith(b"\n") else whole
        except Unreadable:
            if whole == 0:
                raise
            target.truncate(whole)
            return whole
        return size

    def _copy_text(self, target: BinaryIO) -> int:
        """A part of the text, or all of them, and how many bytes."""
        size = 0
        try:
            for _, part in self._parts:
                target.write(part)
                size += len(part)
                if self._size:
                    break
        except Unreadable as error:
            if size == 0:
                raise
            self._parts = _broken(error)
        return size

    def close(self) -> None:
        """Closes the file."""
        self._ends.close()


def _broken(error: Unreadable) -> Iterator[tuple[int, bytes]]:
    raise error
    yield
