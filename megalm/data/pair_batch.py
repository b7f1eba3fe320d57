"""Rows of pairs of answers, as an objective gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from megalm.data.batch import Batch, declare_dims
from megalm.data.pairs import PairedSource
from megalm.data.sources import TokenSource


@dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs. P is the most pairs that any row of the data has; answers 2j and 2j + 1 of a row are pair j's better and
    worse one, answer 2P stands for what is neither."""

    answers: Tensor | None = declare_dims("batch", "sequence")
    """int64 [B, S]: which answer of its row each position is in."""
    ends: Tensor | None = declare_dims("batch", "sequence")
    """fp32 [B, S]: 1 at the last target of each answer, as an input: where a reward is read."""
    counted: Tensor | None = declare_dims("batch", "pairs")
    """fp32 [B, P]: 1 where there is a pair."""
    margins: Tensor | None = declare_dims("batch", "pairs")
    """fp32 [B, P]: by how much the better answer was judged to be better."""
    reference: Tensor | None = declare_dims("batch", "answers")
    """fp64 [B, 2P]: log-probability of each answer under the reference; None: not known (yet)."""


def add_pairs(batch: Batch, rows: Sequence[tuple[TokenSource, int]], most: int) -> PairBatch:
    """The batch with what is known of its pairs.

    Args:
        rows: source and sample of each row; rows of the batch beyond them are padding.
        most: P, alike for every batch of the run.
    """
    assert batch.document_ids is not None
    count = len(batch.tokens)
    counted, margins = np.zeros((count, most), np.float32), np.zeros((count, most), np.float32)
    reference = np.zeros((count, 2 * most))
    known = True
    answers = torch.full(batch.tokens.shape, 2 * most, dtype=torch.int64)
    for row, (source, index) in enumerate(rows):
        assert isinstance(source, PairedSource)
        documents = source.documents_of(index)
        pairs = len(documents) // 2
        counted[row, :pairs] = 1.0
        margins[row, :pairs] = source.margins[documents[::2] // 2]
        known = known and source.reference is not None
        if source.reference is not None:
            reference[row, : 2 * pairs] = source.reference[documents]
        inside = batch.document_ids[row].long()
        answers[row] = torch.where(inside < 2 * pairs, inside, 2 * most)
    return PairBatch(
        **{part.name: getattr(batch, part.name) for part in fields(batch)},
        answers=answers,
        ends=_find_ends(answers, batch.loss_mask, 2 * most),
        counted=torch.from_numpy(counted),
        margins=torch.from_numpy(margins),
        reference=torch.from_numpy(reference) if known else None,
    )


def _find_ends(answers: Tensor, mask: Tensor | None, none: int) -> Tensor:
    """Find where the last target of each answer is read. Shapes: answers int64 [B, S], mask fp32 [B, S] -> fp32 [B, S]"""
    assert mask is not None
    ends = torch.zeros(answers.shape)
    for row in range(len(answers)):
        targets = (mask[row] > 0).nonzero().squeeze(-1)  # each predicts the token that follows
        own = answers[row, targets]
        last = torch.ones_like(own, dtype=torch.bool)
        last[:-1] = own[1:] != own[:-1]
        ends[row, targets[last & (own < none)] + 1] = 1.0
    return ends
