"""Documents that share a row, kept apart: which labels count, and where each document begins."""

from collections.abc import Sequence

import numpy as np
import torch


def separate_documents(
    starts: Sequence[np.ndarray], seq_length: int, filled: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks that keep documents apart: a label that begins another document, or lies in the padding, does not count.

    Shapes:  starts: per row, the positions in (0, S] where a document begins; filled: per row, the tokens before the
    padding -> loss_mask, positions, document_ids [B, S]
    """
    rows = len(starts)
    mask = np.ones((rows, seq_length), np.float32)
    ids = np.zeros((rows, seq_length), np.int32)
    positions = np.empty((rows, seq_length), np.int64)
    for row, begin in enumerate(starts):
        begin = np.asarray(begin, np.int64)
        mask[row, begin - 1] = 0.0
        if filled is not None:
            mask[row, filled[row] - 1 :] = 0.0
        inside = begin[begin < seq_length]
        np.add.at(ids[row], inside, 1)
        ids[row] = np.cumsum(ids[row])
        origin = np.concatenate(([0], inside))
        positions[row] = (
            np.arange(seq_length) - origin[np.searchsorted(origin, np.arange(seq_length), side="right") - 1]
        )
    return torch.from_numpy(mask), torch.from_numpy(positions), torch.from_numpy(ids)
