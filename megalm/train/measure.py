"""What a step measured before its update, gathered over the world in the one message that carries the gradient norm.

The message is a sum. Values needed per rank (a loss for each data rank, a largest logit for each rank) get one slot per
rank; every other rank adds zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalm.config import Config
from megalm.model.attention import Attention
from megalm.model.latent_attention import LatentAttention
from megalm.objectives.objective import Objective
from megalm.optim.stretches import TensorIndex
from megalm.optim.update_sample import UpdateSample
from megalm.parallel.mesh import Mesh
from megalm.train.signals import Signals
from megalm.train.sums import Sums

if TYPE_CHECKING:
    from megalm.model.transformer import Transformer
    from megalm.optim.fully_sharded import FullyShardedOptimizer
    from megalm.optim.sharded import ShardedOptimizer


@dataclass(frozen=True)
class Measured:
    """What `Measurement.take` read, the same on every rank."""

    signals: Signals
    divisor: float
    """What the loss was divided by, and the update must be."""
    tokens: int
    """Tokens of the global batch that count."""
    stop: bool
    """Whether any rank wants to stop."""
    means: dict[str, float]
    """Each further sum of the objective and the layers, divided as the loss was."""
    source_losses: dict[str, float]
    """Mean loss of each data source that had tokens."""
    prediction_losses: dict[str, float]
    """Mean loss of each depth of multi-token prediction, over the tokens that it predicts."""
    layers: dict[str, np.ndarray]
    """What layers report of their own, as sums over the global batch."""


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
        objective: Objective,
        sources: Sequence[str] = (),
    ) -> None:
        """sources: names of the data sources, alike on all ranks, in the order of the objective's sums of each."""
        self.mesh, self.optimizer = mesh, optimizer
        self.sources, self.divisor, self.objective = list(sources), objective.divisor, objective
        self.layer_sums = {name for name in chunks[0].reported if name.startswith("layers.")}
        self.sums = Sums({**chunks[0].reported, **objective.sums})
        self.attention: list[Attention | LatentAttention] = []
        self.updates: UpdateSample | None = None
        self.watched = config.guard.enabled or config.optim.qk_clip > 0
        """Whether attention logits are looked at; alike on all ranks, also on one without an attention layer."""
        self.by_rank = config.guard.enabled and mesh.data.size > 1
        if self.watched:
            self.attention = [
                m for chunk in chunks for m in chunk.modules() if isinstance(m, Attention | LatentAttention)
            ]
            for layer in self.attention:
                layer.largest_logit = torch.full((layer.local_heads,), -math.inf, device=mesh.device)
        if config.guard.enabled:
            parts = optimizer.parts()
            self.updates = UpdateSample(parts, TensorIndex(parts, mesh))

    def begin(self) -> None:
        """A step starts: forget the last one's logits."""
        for layer in self.attention:
            assert layer.largest_logit is not None
            layer.largest_logit.fill_(-math.inf)

    def head_logits(self) -> Tensor:
        """Largest logit of each head on this rank, in the order of its layers. Shapes: -> fp32 [heads of all layers]"""
        found = [layer.largest_logit for layer in self.attention if layer.largest_logit is not None]
        return torch.cat(found) if found else torch.empty(0, device=self.mesh.device)

    def take(self, reports: Sequence[Mapping[str, Tensor]], lr: float, expected: float, stop: bool) -> Measured:
        """Reduce what this rank's stages reported, and all else that is measured.

        lr: what the update would be made with. expected: what the objective was divided by in backward.
        Comm: one all-reduce over the world, of the sums, 2 numbers for each data rank, 1 for each rank and 1 for each
              tensor
        """
        own = self.sums.pack(reports, self.mesh)
        message = [own, own.new_full((1,), float(stop))]
        if self.by_rank:
            losses = own.new_zeros(self.mesh.data.size, 2)
            losses[self.mesh.data.rank, 0] = own[self.sums.places["loss"]].sum()
            losses[self.mesh.data.rank, 1] = own[self.sums.places[self.divisor]].sum()
            message.append(losses.flatten())
        if self.watched:
            largest = own.new_zeros(self.mesh.world_size)
            largest[self.mesh.rank] = self.head_logits().amax().double() if self.attention else -math.inf
            message.append(largest)
        if self.updates is not None:
            message.append(self.updates.sums(self.optimizer.step_count + 1, self.optimizer.last_scale))
        norm, nonfinite, summed = self.optimizer.statistics(extra=torch.cat(message))
        values = torch.cat([norm[None], nonfinite[None], summed]).cpu().numpy()
        return self._read(values, lr, expected)

    def _read(self, values: np.ndarray, lr: float, expected: float) -> Measured:
        (grad_norm, nonfinite), rest = values[:2].tolist(), values[2:]
        sums, rest = self.sums.unpack(rest[: self.sums.length]), rest[self.sums.length :]
        stop, rest = bool(rest[0] > 0), rest[1:]
        divisor = max(float(sums[self.divisor].sum()), 1.0)
        spread = logit = update = None
        worst = -1
        if self.by_rank:
            ranks, rest = rest[: 2 * self.mesh.data.size].reshape(-1, 2), rest[2 * self.mesh.data.size :]
            losses = ranks[:, 0] / np.maximum(ranks[:, 1], 1.0)
            worst = int(np.argmax(np.nan_to_num(losses, nan=np.inf)))
            spread = float(losses.max() - np.median(losses))
        if self.watched:
            logit, rest = float(rest[: self.mesh.world_size].max()), rest[self.mesh.world_size :]
        if self.updates is not None:
            update = lr * math.sqrt(float(np.max(rest / self.updates.counts.numpy())))
        signals = Signals(
            loss=float(sums["loss"].sum()) / divisor,
            grad_norm=grad_norm * expected / divisor,
            nonfinite=nonfinite,
            update_rms=update,
            attention_logit=logit,
            loss_spread=spread,
            worst_rank=worst,
            judged=self.objective.judged,
        )
        known = {"loss", "tokens", self.divisor, *_PAIRS, *self.layer_sums, *self.objective.parts}
        means = {name: float(values.sum()) / divisor for name, values in sums.items() if name not in known}
        means |= self.objective.derive(sums)
        tokens = int(max(float(sums["tokens"].sum()), 1.0))
        layers = {name: values for name, values in sums.items() if name in self.layer_sums}
        by_source = _divide(sums, "source", self.sources)
        by_depth = _divide(sums, "prediction", [str(1 + n) for n in range(len(sums.get("prediction_loss", ())))])
        return Measured(signals, divisor, tokens, stop, means, by_source, by_depth, layers)


_PAIRS = ("source_loss", "source_tokens", "prediction_loss", "prediction_tokens")
"""Sums of several values that are divided by one another."""


def _divide(sums: Mapping[str, np.ndarray], kind: str, names: Sequence[str]) -> dict[str, float]:
    """The mean loss of each of `names` that had tokens."""
    if f"{kind}_loss" not in sums:
        return {}
    seen = zip(names, sums[f"{kind}_loss"].tolist(), sums[f"{kind}_tokens"].tolist(), strict=True)
    return {name: loss / count for name, loss, count in seen if count > 0}
