"""Pairs of answers to one prompt: documents two by two, the better one first, packed so that both are in one sample.

A pair lies whole in one row of one micro-batch, so that its loss is a matter of that row alone, on any layout and however the
batch is split. PREFIX.pairs, an fp32 margin for each pair, marks a token file as one of pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.packing import PackedHeldOut, PackedSource, pack_best_fit
from megalm.data.sources import TokenSource
from megalm.data.tokens import TokenFile

MARGINS = np.dtype("<f4")


class PairedSource(PackedSource):
    """A token file of pairs.

    Errors: ConfigError for a file that is none of pairs, and for a pair that is longer than a sample.
    """

    reference: np.ndarray | None = None
    """fp64 [documents]: the reference's log-probabilities, once they are known."""

    def __init__(self, name: str, file: TokenFile, seq_length: int, weight: float, holdout: float):
        TokenSource.__init__(self, name, file, seq_length, weight, holdout)
        self.margins = read_margins(file)
        if self.train_tokens < file.num_tokens:  # a pair stays on one side of the cut
            document = file.document_at(self.train_tokens) if self.train_tokens else 0
            self.train_tokens = file.document_start(max(0, document - document % 2))
        self._pack(0, self.train_tokens)

    def held_out(self) -> TokenSource:
        return PairedHeldOut(self)

    def _place(self, seq_length: int) -> Path:
        path = super()._place(seq_length)
        return path.with_name(path.name.replace(f".pack{seq_length}", f".pairs{seq_length}"))

    def _fill(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Whole pairs, best fit. Every token is read, the last one too: a reward is read there."""
        both = lengths.reshape(-1, 2).sum(1)
        if len(both) and both.max() > self.seq_length:
            longest = int(both.argmax())
            raise ConfigError(
                f"{self.file.prefix}: the answers of pair {longest + self.file.document_at(self.first) // 2 + 1} have "
                f"{both[longest]} tokens together, and a sample holds {self.seq_length}: make model.seq_length at least "
                f"{both[longest]}, or prepare the data with --max-length {self.seq_length // 2}."
            )
        bins, samples = pack_best_fit(both, self.seq_length)
        documents = np.arange(len(lengths))
        return documents, np.zeros_like(documents), lengths, np.repeat(bins, 2), samples

    def documents_of(self, index: int) -> np.ndarray:
        """Numbers of a sample's documents in the file, in their order in the row. Shapes: -> int64 [2 pairs]"""
        return np.array([self.file.document_at(int(start)) for start in self._pieces(index)[0]], np.int64)

    @property
    def most_pairs(self) -> int:
        """Pairs in the fullest sample."""
        return int(np.diff(self.offsets).max()) // 2 if self.num_samples else 0


class PairedHeldOut(PackedHeldOut, PairedSource):
    """The held-out end of a file of pairs."""

    def __init__(self, source: PairedSource):
        self.margins = source.margins
        super().__init__(source)


def read_margins(file: TokenFile) -> np.ndarray:
    """Read the margin of each pair of a file. Errors: ConfigError where it holds none, or other ones"""
    path = f"{file.prefix}.pairs"
    if not os.path.exists(path):
        raise ConfigError(
            f"{path} is not there: data.packing=pairs reads what `megalm posttrain prepare` makes of records with chosen and "
            "rejected answers."
        )
    margins = np.fromfile(path, MARGINS)
    if 2 * len(margins) != file.num_documents or file.targets is None:
        raise ConfigError(
            f"{path}: has {len(margins)} pairs, and {file.prefix}.idx {file.num_documents} documents, where each pair takes "
            "two with targets: make the data set again with `megalm posttrain prepare`."
        )
    return margins


def count_most_pairs(sources: Sequence[TokenSource]) -> int:
    """Count pairs in the fullest sample of all sources."""
    return max((source.most_pairs for source in sources if isinstance(source, PairedSource)), default=0)
