"""Best-fit packing: samples made of whole documents, so that no document is cut that need not be.

Documents longer than a sample are cut into samples and a rest; the pieces are put, longest first, each into the sample
with the least room that still holds it. What stays empty is padding and does not count in the loss.

The packing is computed once, in time that grows with the number of documents (about a second for four million), and
kept in PREFIX.packSEQ beside the data; afterwards opening maps that file. The order of the samples is the loader's.

Source:  Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv:2404.10830)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.sources import TokenSource
from megalm.data.tokens import TokenFile

MAGIC = b"MEGAPACK"
HEADER = struct.Struct(
    "<8sQQQQQQQ"
)  # magic, version, sequence length, documents, their tokens, all tokens, samples, pieces
VERSION = 1


def pack_best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The bin of each piece by best-fit decreasing, and the number of bins.

    Pieces of equal length are placed together: the bin with the least sufficient room takes as many of them as it
    holds, since after each it is still the one with the least room. So the work grows with the distinct lengths.

    Shapes: lengths int [N], each in 1 .. capacity -> int64 [N]
    """
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    edges = np.flatnonzero(np.diff(ordered)) + 1
    room: dict[int, list[np.ndarray]] = {}  # free room -> bins that have it
    present = 0  # bit r: some bin has room r
    number = 0
    for group in np.split(order, edges) if len(order) else ():
        length = int(lengths[group[0]])
        while len(group):
            above = present >> length
            free = length + (above & -above).bit_length() - 1 if above else capacity
            each = free // length
            needed = -(-len(group) // each)
            if above:
                found = np.concatenate(room.pop(free))
                used, rest = found[:needed], found[needed:]
                if len(rest):
                    room[free] = [rest]
                else:
                    present &= ~(1 << free)
            else:
                used = np.arange(number, number + needed)
                number += needed
            counts = np.full(len(used), each)
            taken = min(len(group), each * len(used))
            counts[-1] = taken - each * (len(used) - 1)
            bins[group[:taken]] = np.repeat(used, counts)
            group = group[taken:]
            for part, left in ((used[:-1], free - each * length), (used[-1:], free - int(counts[-1]) * length)):
                if len(part) and left:
                    room.setdefault(left, []).append(part)
                    present |= 1 << left
    return bins, number


def cut_pieces(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut to at most seq_length + 1 tokens; neighbours share a token, so that each but the first is predicted.

    A document of a single token predicts nothing and is left out.
    Shapes: lengths int64 [documents] -> document, first token in it, tokens: int64 [pieces]
    """
    count = np.where(lengths > 1, -(-(lengths - 1) // seq_length), 0)
    document = np.repeat(np.arange(len(lengths)), count)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)) * seq_length
    return document, first, np.minimum(lengths[document] - first, seq_length + 1)


class PackedSource(TokenSource):
    """A token file whose samples are packed from whole documents.

    Errors: ConfigError if the packing cannot be read or kept.
    """

    def __init__(self, name: str, file: TokenFile, seq_length: int, weight: float, holdout: float):
        super().__init__(name, file, seq_length, weight, holdout)
        self._pack(0, self.train_tokens)

    def held_out(self) -> TokenSource:
        """The documents that are never trained on, packed in the same way."""
        return PackedHeldOut(self)

    def _pack(self, first: int, end: int) -> None:
        """Pack the tokens [first, end) of the file."""
        self.first, self.end = first, end
        path = self._place(self.seq_length)
        if not self._map(path):
            self._build(path)
            if not self._map(path):
                raise ConfigError(f"{path}: the packing was written and cannot be read back: is the disk full?")

    def _place(self, seq_length: int) -> Path:
        """Beside a local pair; else in the cache."""
        cache = getattr(self.file, "cache", None)
        if cache is None:
            return Path(f"{self.file.prefix}.pack{seq_length}")
        digest = hashlib.blake2b(str(self.file.prefix).encode(), digest_size=12).hexdigest()
        cache.folder.mkdir(parents=True, exist_ok=True)
        return cache.folder / f"{digest}.pack{seq_length}"

    def _key(self) -> tuple[int, ...]:
        documents = 0
        if self.end > self.first:
            documents = self.file.document_at(self.end - 1) + 1 - self.file.document_at(self.first)
        return VERSION, self.seq_length, documents, self.end, self.file.num_tokens

    def _map(self, path: Path) -> bool:
        """Map the packing, if it is there, whole, and of these very documents."""
        try:
            with open(path, "rb") as file:
                magic, *key, samples, pieces = HEADER.unpack(file.read(HEADER.size))
        except (OSError, struct.error):
            return False
        size = HEADER.size + 8 * (samples + 1) + 12 * pieces
        if magic != MAGIC or tuple(key) != self._key() or os.stat(path).st_size != size:
            return False
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
        at = HEADER.size + 8 * (samples + 1)
        self.offsets = raw[HEADER.size : at].view("<i8")
        self.starts = raw[at : at + 8 * pieces].view("<i8")
        self.sizes = raw[at + 8 * pieces :].view("<i4")
        if samples and (self.offsets[0] != 0 or self.offsets[-1] != pieces):
            return False
        self.num_samples = samples
        return True

    def _build(self, path: Path) -> None:
        try:
            with open(f"{path}.lock", "wb") as lock:  # one process of a machine packs, the others wait for it
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._map(path):
                    self._write(path)
        except OSError as error:
            raise ConfigError(
                f"{path}: the packing cannot be kept beside the data ({error.strerror}). Make the folder writable, or "
                "use data.packing=documents."
            ) from error

    def _write(self, path: Path) -> None:
        starts = np.array([self.first])
        if self.end > self.first:
            inside = self.file.document_starts(self.first, self.end)[1]
            starts = np.concatenate((starts, inside, [self.end]))
        document, first, size, bins, samples = self._fill(np.diff(starts))
        order = np.argsort(bins, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(np.bincount(bins, minlength=samples))))
        temporary = f"{path}.{os.getpid()}.partial"
        with open(temporary, "wb") as file:
            file.write(HEADER.pack(MAGIC, *self._key(), samples, len(size)))
            file.write(offsets.astype("<i8").data)
            file.write((starts[document] + first)[order].astype("<i8").data)
            file.write(size[order].astype("<i4").data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def _fill(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Document, first token in it, tokens and sample of each piece, and the number of samples.

        Shapes: lengths int64 [documents] -> int64 [pieces] each
        """
        document, first, size = cut_pieces(lengths, self.seq_length)
        return document, first, size, *pack_best_fit(size, self.seq_length + 1)

    def _pieces(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        starts, sizes = self.starts[part], self.sizes[part]
        if (
            not len(sizes)
            or sizes.min() < 1
            or sizes.sum() > self.seq_length + 1
            or (starts.min() < self.first or (starts + sizes).max() > self.end)
        ):
            path = self._place(self.seq_length)
            raise ConfigError(f"{path}: sample {index} is not one: the file is damaged. Remove it; it is made again.")
        return starts, sizes

    def read(self, index: int, length: int | None = None) -> np.ndarray:
        row = np.empty(self.seq_length + 1, np.int64)
        self.read_into(row, index)
        return row

    def _copy(self, row: np.ndarray, index: int, column: Any) -> None:
        """Pieces one after another, then zeros."""
        at = 0
        for start, size in zip(*self._pieces(index), strict=True):
            row[at : at + size] = column[start : start + size]
            at += int(size)
        row[at:] = 0

    def prefetch(self, index: int, length: int) -> None:
        for start, size in zip(*self._pieces(index), strict=True):
            self.file.prefetch(int(start), int(start + size))

    def filled(self, index: int, length: int | None = None) -> int:
        return int(self._pieces(index)[1].sum())

    def boundaries(self, index: int, length: int | None = None) -> np.ndarray:
        """Where pieces after the first begin, and where the padding does."""
        ends = np.cumsum(self._pieces(index)[1], dtype=np.int64)
        return ends[ends <= self.seq_length]

    def token_at(self, index: int, length: int, at: int) -> int:
        starts, sizes = self._pieces(index)
        ends = np.cumsum(sizes, dtype=np.int64)
        piece = min(int(np.searchsorted(ends, at, side="right")), len(ends) - 1)
        return int(starts[piece] + at - (ends[piece] - sizes[piece]))

    def locate(self, index: int, length: int | None = None) -> dict[str, object]:
        start = int(self._pieces(index)[0][0])
        document = self.file.document_at(start)
        offset = start - self.file.document_start(document)
        return {"document": document, "offset": offset, "token": start, "byte": start * self.file.dtype.itemsize}


class PackedHeldOut(PackedSource):
    """The held-out end of a packed file, in PREFIX.packSEQ.held."""

    def __init__(self, source: PackedSource):
        TokenSource.__init__(self, source.name, source.file, source.seq_length, source.weight, holdout=1.0)
        self._pack(source.train_tokens, source.file.num_tokens)

    def _place(self, seq_length: int) -> Path:
        path = super()._place(seq_length)
        return path.with_name(f"{path.name}.held")
