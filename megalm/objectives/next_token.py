"""Next-token prediction: cross-entropy with the token that follows, for pretraining and fine-tuning."""

import torch
from torch import Tensor

from megalm.data.batch import Batch
from megalm.model.head import Head
from megalm.objectives.objective import Objective, Outcome


class NextToken(Objective):
    """Sum of mask * cross-entropy over this rank's tokens; where there are several sources, each one's sums, too.

    Args:
        z_loss: factor on log^2 Z, in training only.
        sources: number of data sources whose losses are measured apart; 0: not apart.
    """

    def __init__(self, z_loss: float = 0.0, sources: int = 0) -> None:
        self.z_loss, self.sources = z_loss, sources
        self.sums = {"loss": 1, "tokens": 1}
        if sources:
            self.sums |= {"source_loss": sources, "source_tokens": sources}

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        mask = None if batch.loss_mask is None else batch.loss_mask.t()
        total, per_token = head.losses(hidden, batch.labels.t(), mask, self.z_loss if head.training else 0.0)
        per_token = per_token.detach()
        count = torch.full((), float(per_token.numel()), device=per_token.device) if mask is None else mask.sum()
        sums = {"loss": total.detach(), "tokens": count}
        if self.sources and batch.sources is not None:
            rows = per_token.sum(0)
            counts = torch.full_like(rows, float(per_token.shape[0])) if mask is None else mask.sum(0)
            for name, values in (("source_loss", rows), ("source_tokens", counts)):
                empty = torch.zeros(self.sources, dtype=values.dtype, device=values.device)
                sums[name] = empty.index_add_(0, batch.sources, values)
        return Outcome(total, sums)
