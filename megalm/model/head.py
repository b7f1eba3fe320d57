"""The end of the model: from the residual stream to logits, losses and log-probabilities of tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from megalm.architecture.shape import resolve_shape
from megalm.architecture.tensors import VALUE_HEAD
from megalm.config import ModelConfig
from megalm.model.norm import make_norm
from megalm.parallel import collectives
from megalm.parallel.embedding import VocabularyParallelEmbedding
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ColumnParallelLinear, Output, column_parallel
from megalm.parallel.loss import vocabulary_parallel_cross_entropy, vocabulary_parallel_linear_cross_entropy
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Role, attach, make_replicated, slice_of


class ValueHead(nn.Module):
    """One number for each hidden state, in fp32; whole on every tensor rank. Shapes: [.., H] -> [..]; weight [1, H]"""

    def __init__(self, size: int, context: LayerContext, init_std: float) -> None:
        super().__init__()
        weight = nn.Parameter(torch.empty(1, size, **context.of_parameters))
        slice_ = make_replicated(
            VALUE_HEAD,
            (1, size),
            context.tensor,
            partial_gradient=context.sequence,
            role=Role.OUTPUT,
            initial=init_std,
        )
        self.weight = attach(weight, slice_)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class Head(nn.Module):
    """The final norm and the output matrix, its own or the embedding's.

    logits = cap(scale norm(hidden) W^T), with W's vocabulary split over the tensor axis and never gathered

    Shapes:  hidden [S/t or S, B, H] -> logits [S, B, V/t]; losses and log-probabilities [S, B] fp32
    Comm:    with sequence parallelism all-gather(S) forward, reduce-scatter(S) backward; all-reduces of [S, B] for losses
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        embedding: VocabularyParallelEmbedding | None,
    ) -> None:
        """embedding: whose matrix is the output matrix; None: the head has one of its own."""
        super().__init__()
        self.vocab_size, self.parallel = config.vocab_size, context.parallel
        self.scale, self.softcap = config.logit_scale, config.logit_softcap
        self.tensor, self.sequence = context.tensor, context.sequence
        self.context = context.mesh.context
        """The ranks that a sequence is cut over: what is summed over a whole sequence is added up over them."""
        self.final_norm = make_norm(resolve_shape(config).norm, context, name="final_norm")
        self._tied = (embedding,)  # a tuple, so that its parameters are counted where the embedding stands
        if embedding is None:
            self.output = ColumnParallelLinear(
                config.hidden_size,
                [Output("output", config.vocab_size)],
                context.tensor,
                bias=False,
                init_std=config.init_std,
                role=Role.OUTPUT,
                product=context.product("output"),
                **context.of_layers,
            )
            if config.prediction.depth:  # each depth brings a part of its gradient
                attach(self.output.weight, replace(slice_of(self.output.weight), shared=True))

        if config.value_head:
            self.value_head = ValueHead(config.hidden_size, context, config.init_std)

    def values(self, hidden: Tensor) -> Tensor:
        """The value head's number at each position. Shapes: hidden [S/t or S, B, H] -> fp32 [S, B]

        Comm: with sequence parallelism all-gather of [S/t, B]
        """
        values = self.value_head(self.final_norm(hidden))
        return collectives.join(values, self.tensor) if self.sequence else values

    @property
    def weight(self) -> Tensor:
        """The output matrix, [V/t, H]."""
        (embedding,) = self._tied
        return self.output.weight if embedding is None else embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's share of the logits. Shapes: [S/t or S, B, H] -> [S, B, V/t]"""
        return self._map(self.final_norm(hidden))

    def _map(self, normed: Tensor) -> Tensor:
        normed = self._scaled(normed)
        (embedding,) = self._tied
        if embedding is not None:
            logits = column_parallel(normed, embedding.weight, None, self.tensor, self.sequence)
        else:
            logits = self.output(normed)
        return self.cap(logits)

    def _scaled(self, normed: Tensor) -> Tensor:
        return normed if self.scale == 1.0 else normed * self.scale

    def cap(self, logits: Tensor) -> Tensor:
        """Keep logits below the cap, where there is one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def losses(
        self, hidden: Tensor, labels: Tensor, mask: Tensor | None = None, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(sum of mask * cross-entropy, mask * cross-entropy of each position), with all logits at once or, where
        `parallel.loss_chunk` wants it, in chunks of positions; then gradients flow through the sum alone.

        Shapes: hidden [S/t or S, B, H]; labels, mask [S, B] -> fp32 scalar, fp32 [S, B]
        """
        return self.losses_of_normed(self.final_norm(hidden), labels, mask, z_loss)

    def losses_of_normed(
        self, normed: Tensor, labels: Tensor, mask: Tensor | None = None, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The same of a stream that has been normed already, by the final norm or by another."""
        chunk = self.parallel.loss_positions(labels.numel(), self.weight.shape[0], normed.element_size())
        if chunk < labels.numel():
            return self._losses_in_chunks(normed, labels, mask, z_loss, chunk)
        losses = vocabulary_parallel_cross_entropy(
            self._map(normed),
            labels,
            self.tensor,
            vocab_size=self.vocab_size,
            z_loss=z_loss,
            inplace_backward=True,
        )
        losses = losses if mask is None else losses * mask
        return losses.sum(), losses

    def log_probabilities(self, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability of each label where tokens are drawn at this temperature, through which gradients flow; 0 for labels
        outside the vocabulary.

        Shapes: hidden [S/t or S, B, H]; labels [S, B] -> fp32 [S, B]
        """
        logits = self.logits(hidden)
        return -vocabulary_parallel_cross_entropy(
            logits if temperature == 1.0 else logits / temperature,
            labels,
            self.tensor,
            vocab_size=self.vocab_size,
            inplace_backward=True,
        )

    @torch.no_grad()
    def score_labels(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability of each label, whether it is the likeliest token: the first of equals).

        Shapes: hidden [S/t or S, B, H]; labels [S, B], inside the vocabulary -> fp32 [S, B], bool [S, B]
        Comm:   beside the logits' and losses' own, an all-gather of [S, B] values and indices over the tensor axis
        """
        logits = self.logits(hidden)
        first = self.tensor.rank * logits.shape[-1]
        own = logits[..., : max(0, self.vocab_size - first)].float()
        if own.shape[-1]:
            index = own.argmax(-1, keepdim=True)
            best = torch.cat([own.gather(-1, index).double(), (index + first).double()], -1)
        else:  # this rank's share is padding
            best = torch.full((*labels.shape, 2), -torch.inf, dtype=torch.float64, device=logits.device)
        best = collectives.all_gather(best, self.tensor, dim=-1).unflatten(-1, (-1, 2))
        winner = best[..., 0].argmax(-1, keepdim=True)
        likeliest = best[..., 1].gather(-1, winner).squeeze(-1).long()
        losses = vocabulary_parallel_cross_entropy(logits, labels, self.tensor, vocab_size=self.vocab_size)
        return -losses, likeliest == labels

    def _losses_in_chunks(
        self, normed: Tensor, labels: Tensor, mask: Tensor | None, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        loss: Any = partial(
            vocabulary_parallel_linear_cross_entropy if self.softcap is None else self._capped_losses,
            labels=labels,
            mask=mask,
            axis=self.tensor,
            sequence_parallel=self.sequence,
            vocab_size=self.vocab_size,
            chunk=chunk,
            z_loss=z_loss,
        )
        normed = self._scaled(normed)
        (embedding,) = self._tied
        return self.output(normed, instead=loss) if embedding is None else loss(normed, embedding.weight)

    def _capped_losses(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        axis: Axis,
        *,
        sequence_parallel: bool,
        vocab_size: int,
        chunk: int,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        """What `vocabulary_parallel_linear_cross_entropy` gives, of capped logits: those of a chunk are made again in
        backward."""

        def losses_of(rows: Tensor, own: Tensor) -> Tensor:
            logits = self.cap(F.linear(rows, weight))
            return vocabulary_parallel_cross_entropy(logits, own, axis, vocab_size=vocab_size, z_loss=z_loss)

        whole = (collectives.gather if sequence_parallel else collectives.copy)(hidden, axis).flatten(0, 1)
        found = [
            torch.utils.checkpoint.checkpoint(losses_of, rows, own, use_reentrant=False, preserve_rng_state=False)
            for rows, own in zip(whole.split(chunk), labels.flatten().split(chunk), strict=True)
        ]
        losses = torch.cat(found).view(labels.shape)
        losses = losses if mask is None else losses * mask
        return losses.sum(), losses
