"""Prompts with their completions as rows of batches, kept apart by mask and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megalm.data.packing import pack_best_fit
from megalm.objectives.policy import PolicyBatch


@dataclass(frozen=True)
class Text:
    """One prompt with one completion."""

    prompt: Sequence[int]
    completion: Sequence[int]
    drawn: Sequence[float]
    """Log-probability of each token of the completion where it was drawn."""
    advantage: float
    learned: bool
    """False: its tokens are in the batch, and count nothing."""

    @property
    def length(self) -> int:
        """Positions that it takes: its last token is predicted, and never read."""
        return len(self.prompt) + len(self.completion) - 1


def pack_texts(texts: Sequence[Text], seq_length: int, multiple: int, *, together: bool) -> PolicyBatch:
    """All texts as one batch of whole rows, the same on every rank; rows to fill it up count nothing.

    multiple: what the number of rows is filled up to a multiple of. together: several texts in a row, best fit; else one in each.
    Shapes: -> [rows, seq_length]
    """
    lengths = np.array([text.length for text in texts])
    bins, count = pack_best_fit(lengths, seq_length) if together else (np.arange(len(texts)), len(texts))
    rows = -(-count // multiple) * multiple
    tokens, labels = np.zeros((rows, seq_length), np.int64), np.zeros((rows, seq_length), np.int64)
    mask, shares, advantages, drawn = (np.zeros((rows, seq_length), np.float32) for _ in range(4))
    positions = np.tile(np.arange(seq_length), (rows, 1))
    numbers = np.zeros((rows, seq_length), np.int64)
    used, inside = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for text, row in zip(texts, bins.tolist(), strict=True):
        whole = np.array([*text.prompt, *text.completion])
        start, stop = used[row], used[row] + text.length
        tokens[row, start:stop], labels[row, start:stop] = whole[:-1], whole[1:]
        positions[row, start:stop] = np.arange(text.length)
        numbers[row, start:stop] = inside[row]
        first = start + len(text.prompt) - 1
        drawn[row, first:stop] = text.drawn
        if text.learned:
            mask[row, first:stop] = 1.0
            shares[row, first:stop] = 1.0 / len(text.completion)
            advantages[row, first:stop] = text.advantage
        used[row], inside[row] = stop, inside[row] + 1
        numbers[row, stop:] = inside[row]
        positions[row, stop:] = np.arange(seq_length - stop)
    given = {name: torch.from_numpy(array) for name, array in {
        "tokens": tokens, "labels": labels, "loss_mask": mask, "positions": positions, "texts": numbers,
        "document_ids": numbers.astype(np.int32), "shares": shares, "advantages": advantages, "drawn": drawn,
    }.items()}  # fmt: skip
    return PolicyBatch(**given)


def cut_rows(batch: PolicyBatch, start: int, stop: int) -> PolicyBatch:
    """Some of a batch's rows."""
    given = {name: value[start:stop] for name, value in vars(batch).items() if value is not None}
    return PolicyBatch(**given)
