"""A source of samples: one token file, cut into a training part and a held-out end, both cut into samples of one
length.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import Any

import numpy as np

from megalm.data.tokens import TokenFile

PROBES, PROBE_TOKENS = 16, 64
"""A fingerprint's stretches: sixteen pages of a mapped file, from its first token to its last."""


class TokenSource:
    """Samples of `seq_length` + 1 tokens from one file; neighbours share one token, so that every token but the
    first is predicted once.

    The last `holdout` share of the documents is never trained on; the cut is looked up in the index, at any size in
    constant time. A file of a single document is cut by tokens; `holdout` 1 keeps all of it for evaluation.
    """

    def __init__(self, name: str, file: TokenFile, seq_length: int, weight: float, holdout: float):
        self.name, self.file, self.seq_length, self.weight = name, file, seq_length, weight
        if holdout >= 1:
            self.train_tokens = 0
        elif holdout <= 0:
            self.train_tokens = file.num_tokens
        elif file.num_documents > 1:
            held = min(file.num_documents - 1, math.ceil(file.num_documents * holdout))
            self.train_tokens = file.document_start(file.num_documents - held)
        else:
            self.train_tokens = file.num_tokens - math.ceil(file.num_tokens * holdout)
        self.num_samples = max(0, (self.train_tokens - 1) // seq_length)

    @cached_property
    def fingerprint(self) -> str | None:
        """Tells this file's tokens from those of another one, wherever it lies: their number, and short stretches over all
        of them. None where reading these would fetch a file from a store."""
        if self.file.cache:
            return None
        count = self.file.num_tokens
        digest = hashlib.blake2b(str(count).encode(), digest_size=8)
        for part in range(PROBES):
            start = part * max(0, count - PROBE_TOKENS) // (PROBES - 1)
            digest.update(
                np.ascontiguousarray(self.file.read(start, min(count, start + PROBE_TOKENS)), "<i8").tobytes()
            )
        if self.file.targets is not None:
            for part in range(PROBES):
                start = part * max(0, count - PROBE_TOKENS) // (PROBES - 1)
                digest.update(self.file.targets[start : start + PROBE_TOKENS].tobytes())
        return digest.hexdigest()

    def read(self, index: int, length: int | None = None) -> np.ndarray:
        """Sample `index` of those of `length` tokens (default: `seq_length`). Shapes: -> int64 [length + 1]"""
        length = length or self.seq_length
        return self.file.read(index * length, (index + 1) * length + 1)

    def read_into(self, row: np.ndarray, index: int) -> None:
        """Sample `index` of those of the row's length. Shapes: row [length + 1], of a type that holds the tokens"""
        self._copy(row, index, self.file.tokens)

    def read_targets_into(self, row: np.ndarray, index: int) -> None:
        """Read the weight of each of these tokens as a target; ones where the file has none. Shapes: row fp32 [length + 1]"""
        if self.file.targets is None:
            row[:] = 1.0
        else:
            self._copy(row, index, self.file.targets)

    def _copy(self, row: np.ndarray, index: int, column: Any) -> None:
        """What a column (the tokens, or what there is of each) holds for a sample; zeros in the padding."""
        start = index * (len(row) - 1)
        row[:] = column[start : start + len(row)]

    def prefetch(self, index: int, length: int) -> None:
        """The sample will be read soon."""
        self.file.prefetch(index * length, (index + 1) * length + 1)

    def held_out(self) -> TokenSource:
        """The text that is never trained on, laid out in samples as the training text is."""
        return HeldOutSource(
            self.name, self.file, self.seq_length, self.weight, first=self.train_tokens, end=self.file.num_tokens
        )

    def boundaries(self, index: int, length: int | None = None) -> np.ndarray:
        """Positions in (0, length] of the sample where a new document begins."""
        length = length or self.seq_length
        start = index * length
        return self.file.document_starts(start, start + length + 1)[1] - start

    def token_at(self, index: int, length: int, at: int) -> int:
        """Which token of the file is token `at` of the sample."""
        return index * length + at

    def filled(self, index: int, length: int | None = None) -> int:
        """Tokens of the sample; what follows them is padding."""
        return (length or self.seq_length) + 1

    def locate(self, index: int, length: int | None = None) -> dict[str, Any]:
        """Locate where the sample lies: document, token inside it, token of the file, byte of .bin."""
        start = index * (length or self.seq_length)
        document = self.file.document_at(start)
        return {
            "document": document,
            "offset": start - self.file.document_start(document),
            "token": start,
            "byte": start * self.file.dtype.itemsize,
        }


class HeldOutSource(TokenSource):
    """Samples of the tokens [first, end) of a file, in the file's order; the last one ends in padding."""

    def __init__(self, name: str, file: TokenFile, seq_length: int, weight: float, *, first: int, end: int):
        super().__init__(name, file, seq_length, weight, holdout=1.0)
        self.first, self.end = first, end
        self.num_samples = max(0, math.ceil((end - first - 1) / seq_length))

    def _span(self, index: int) -> tuple[int, int]:
        start = self.first + index * self.seq_length
        return start, min(start + self.seq_length + 1, self.end)

    def read(self, index: int, length: int | None = None) -> np.ndarray:
        row = np.empty(self.seq_length + 1, np.int64)
        self.read_into(row, index)
        return row

    def _copy(self, row: np.ndarray, index: int, column: Any) -> None:
        start, end = self._span(index)
        row[: end - start] = column[start:end]
        row[end - start :] = 0

    def prefetch(self, index: int, length: int) -> None:
        self.file.prefetch(*self._span(index))

    def filled(self, index: int, length: int | None = None) -> int:
        start, end = self._span(index)
        return end - start

    def boundaries(self, index: int, length: int | None = None) -> np.ndarray:
        """Where documents after the first begin, and where the padding does."""
        start, end = self._span(index)
        starts = self.file.document_starts(start, end)[1] - start
        return starts if end - start > self.seq_length else np.append(starts, end - start)

    def token_at(self, index: int, length: int, at: int) -> int:
        return self._span(index)[0] + at
