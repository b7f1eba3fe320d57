"""What a step measured before its update, gathered over the world in the one message that carries the gradient norm.

The message is a sum. What is wanted by itself (a loss for each data rank, a largest logit for each rank) has a place of
its own in it, which is zero on all other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalm.config import Config
from megalm.data.batch import Batch
from megalm.model.attention import Attention
from megalm.optim.stretches import TensorIndex
from megalm.optim.update_sample import UpdateSample
from megalm.parallel.mesh import Mesh
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.model.transformer import Transformer
    from megalm.optim.fully_sharded import FullyShardedOptimizer
    from megalm.optim.sharded import ShardedOptimizer


class Measurement:
    """The step's numbers, alike on every rank; reading them is the step's only host synchronisation.

    With the guard off, and no clipping of attention logits, only loss, gradient norm and non-finite values are measured.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        chunks: Sequence[Transformer],
        optimizer: ShardedOptimizer | FullyShardedOptimizer,
    ) -> None:
        self.mesh, self.optimizer = mesh, optimizer
        self.sources: list[str] = []
        """Names of the data sources whose losses are measured apart; alike on all ranks."""
        self.source_losses: dict[str, float] = {}
        """Mean loss of each source that had tokens in the last step."""
        self.attention: list[Attention] = []
        self.updates: UpdateSample | None = None
        self.watched = config.guard.enabled or config.optim.qk_clip > 0
        """Whether attention logits are looked at; alike on all ranks, also on one without an attention layer."""
        self.by_rank = config.guard.enabled and mesh.data.size > 1
        if self.watched:
            self.attention = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Attention)]
            for layer in self.attention:
                heads = layer.qkv.split_sizes[0] // layer.head_dim
                layer.largest_logit = torch.full((heads,), -math.inf, device=mesh.device)
        if config.guard.enabled:
            parts = optimizer.parts()
            self.updates = UpdateSample(parts, TensorIndex(parts, mesh), config.optim)

    def begin(self) -> None:
        """A step starts: forget the last one's logits."""
        for layer in self.attention:
            assert layer.largest_logit is not None
            layer.largest_logit.fill_(-math.inf)

    def head_logits(self) -> Tensor:
        """Largest logit of each head on this rank, in the order of its layers. Shapes: -> fp32 [heads of all layers]"""
        found = [layer.largest_logit for layer in self.attention if layer.largest_logit is not None]
        return torch.cat(found) if found else torch.empty(0, device=self.mesh.device)

    def take(
        self,
        reports: Sequence[Tensor],
        lr: float,
        expected_tokens: int,
        stop: bool,
        batches: Sequence[Batch] = (),
    ) -> tuple[Signals, float, bool]:
        """(signals, tokens of the global batch, whether any rank wants to stop).

        lr: what the update would be made with. expected_tokens: what the objective was divided by.
        batches: what the reports are of, to tell the sources apart.
        Comm: one all-reduce over the world, of 5 numbers, 2 for each source and each data rank, 1 for each rank and 1 for
              each tensor
        """
        own = sum_own(reports, self.mesh, float(stop))
        message = [own]
        if self.sources:
            message.append(sum_sources(reports, batches, len(self.sources), self.mesh))
        if self.by_rank:
            losses = own.new_zeros(self.mesh.data.size, 2)
            losses[self.mesh.data.rank] = own[:2]
            message.append(losses.flatten())
        if self.watched:
            largest = own.new_zeros(self.mesh.world_size)
            largest[self.mesh.rank] = self.head_logits().amax().double() if self.attention else -math.inf
            message.append(largest)
        if self.updates is not None:
            message.append(self.updates.sums(self.optimizer.step_count + 1, self.optimizer.last_scale))
        norm, nonfinite, summed = self.optimizer.statistics(extra=torch.cat(message))
        values = torch.cat([norm[None], nonfinite[None], summed]).cpu().numpy()
        return self._read(values, lr, expected_tokens)

    def _read(self, values: np.ndarray, lr: float, expected_tokens: int) -> tuple[Signals, float, bool]:
        grad_norm, bad_values, loss_sum, tokens, stop = values[:5].tolist()
        tokens, rest = max(tokens, 1.0), values[5:]
        if self.sources:
            sums, rest = rest[: 2 * len(self.sources)].reshape(2, -1), rest[2 * len(self.sources) :]
            seen = zip(self.sources, *sums.tolist(), strict=True)
            self.source_losses = {name: loss / count for name, loss, count in seen if count > 0}
        spread = logit = update = None
        worst = -1
        if self.by_rank:
            sums, rest = rest[: 2 * self.mesh.data.size].reshape(-1, 2), rest[2 * self.mesh.data.size :]
            losses = sums[:, 0] / np.maximum(sums[:, 1], 1.0)
            worst = int(np.argmax(np.nan_to_num(losses, nan=np.inf)))
            spread = float(losses.max() - np.median(losses))
        if self.watched:
            logit, rest = float(rest[: self.mesh.world_size].max()), rest[self.mesh.world_size :]
        if self.updates is not None:
            update = lr * math.sqrt(float(np.max(rest / self.updates.counts.numpy())))
        signals = Signals(
            loss=loss_sum / tokens,
            grad_norm=grad_norm * expected_tokens / tokens,
            nonfinite=bad_values,
            update_rms=update,
            attention_logit=logit,
            loss_spread=spread,
            worst_rank=worst,
        )
        return signals, tokens, stop > 0


def sum_own(reports: Sequence[Tensor], mesh: Mesh, flag: float = 0.0) -> Tensor:
    """[loss sum, tokens, flag] of this rank, fp64, such that the sum over the world counts each token once."""
    total = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for report in reports:
        total[:2] += report[:2]
    total[:2] /= mesh.tensor.size
    total[2] = flag
    return total


def sum_sources(reports: Sequence[Tensor], batches: Sequence[Batch], sources: int, mesh: Mesh) -> Tensor:
    """Loss sum of each source, then tokens of each, such that the sum over the world counts each token once.

    Shapes: reports [2 + 2 B], of this rank's micro-batches in their order -> fp64 [2 sources]
    """
    total = torch.zeros(2, sources, dtype=torch.float64, device=mesh.device)
    for report, batch in zip(reports, batches, strict=False):  # no reports on ranks without the last stage
        if batch.sources is not None:
            total.index_add_(1, batch.sources, report[2:].double().view(2, -1))
    return total.flatten() / mesh.tensor.size
