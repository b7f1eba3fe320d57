"""One chunk of a decoder-only transformer: what a pipeline stage runs; a whole model is the chunk with every layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megalm.config import ModelConfig, ParallelConfig
from megalm.data.batch import Batch
from megalm.model.attention import Attention
from megalm.model.mlp import MLP
from megalm.model.positions import LearnedPositions, Positions, Where
from megalm.model.recompute import recomputed
from megalm.parallel.embedding import VocabularyParallelEmbedding
from megalm.parallel.linear import ColumnParallelLinear, Output, column_parallel
from megalm.parallel.loss import vocabulary_parallel_cross_entropy, vocabulary_parallel_linear_cross_entropy
from megalm.parallel.mesh import Mesh
from megalm.parallel.norm import Norm
from megalm.parallel.random import dropout


class Layer(nn.Module):
    """Attention and MLP around the residual stream.

    pre:       h' = h + attention(norm(h));  y = h' + mlp(norm(h'))
    post:      h' = h + norm(attention(h));  y = h' + norm(mlp(h'))          (OLMo 2)
    parallel:  y = h + attention(norm(h)) + mlp(norm'(h))                     (GPT-NeoX)

    Shapes:  [S/t or S, B, H] -> the same
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        *,
        index: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.sequence = parallel.sequence and mesh.tensor.size > 1
        self.tensor = mesh.tensor
        self.dropout = config.dropout
        self.placement = "parallel" if config.parallel_residual else config.norm_placement
        self.recompute_norms = parallel.recompute == "selective"
        self.attention_norm = make_norm(config, mesh, parallel, f"{name}.attention_norm", device, dtype)
        self.attention = Attention(config, mesh, parallel, name=f"{name}.attention", device=device, dtype=dtype)
        self.mlp_norm = make_norm(config, mesh, parallel, f"{name}.mlp_norm", device, dtype)
        self.mlp = MLP(config, mesh, parallel, name=f"{name}.mlp", device=device, dtype=dtype)

    def forward(self, hidden: Tensor, where: Where) -> Tensor:
        if self.placement == "post":
            hidden = self._drop(self.attention_norm(self.attention(hidden, where)), hidden)
            return self._drop(self.mlp_norm(self.mlp(hidden)), hidden)
        normed = self.attention_norm(hidden)
        attended = self._drop(
            self._consume(normed, lambda: self.attention_norm(hidden), lambda: self.attention(normed, where))
        )
        if self.placement == "parallel":
            return self._drop(self.mlp(self.mlp_norm(hidden)), hidden + attended)
        normed, summed = self.mlp_norm(attended, hidden)
        output = self._consume(normed, lambda: self.mlp_norm(summed), lambda: self.mlp(normed))
        return self._drop(output, summed)

    def _consume(self, produced: Tensor, again: Callable[[], Tensor], consumer: Callable[[], Tensor]) -> Tensor:
        """Run `consumer`, which reads `produced`; under selective recomputation it keeps `again` instead."""
        if not self.recompute_norms:
            return consumer()
        with recomputed(produced, again):
            return consumer()

    def _drop(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return dropout(x, self.dropout, self.training, self.tensor, sharded=self.sequence, residual=residual)


class Transformer(nn.Module):
    """The layers `layers` of the model, with the embedding if `first` and the loss if `last`.

    Shapes:  tokens [B, S/c] or hidden [S/(c t) or S/c, B, H] -> hidden, or on the last chunk the pair
             (objective: scalar to run backward from, a sum over this rank's tokens; report: fp32 [loss sum, tokens],
             and, where the batch names sources, the loss sum of each row, then the tokens of each row)
    Comm:    inside the tensor and context axes only
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        *,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        self.sequence = parallel.sequence and mesh.tensor.size > 1
        self.tensor, self.context = mesh.tensor, mesh.context
        self.parallel = parallel
        self.recompute_layers = parallel.recompute == "full"
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if first or config.tie_embeddings and last:
            self.embedding = VocabularyParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                mesh.tensor,
                name="embedding",
                sequence_parallel=self.sequence,
                init_std=config.init_std,
                **made,
            )
        if first:
            if config.position == "learned":
                self.position_embedding = LearnedPositions(
                    config.seq_length,
                    config.hidden_size,
                    mesh.tensor,
                    name="position_embedding",
                    sequence_parallel=self.sequence,
                    init_std=config.init_std,
                    **made,
                )
            if config.embedding_norm:
                self.embedding_norm = make_norm(config, mesh, parallel, "embedding_norm", device, dtype)
        self.positions = Positions(config, mesh.tensor, device)
        self.layers = nn.ModuleList(
            Layer(config, mesh, parallel, index=index, **made)
            for index in (layers if layers is not None else range(config.num_layers))
        )
        if last:
            self.final_norm = make_norm(config, mesh, parallel, "final_norm", device, dtype)
            if not config.tie_embeddings:
                self.output = ColumnParallelLinear(
                    config.hidden_size,
                    [Output("output", config.vocab_size)],
                    mesh.tensor,
                    bias=False,
                    sequence_parallel=self.sequence,
                    init_std=config.init_std,
                    **made,
                )

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.embed(batch) if self.first else x
        assert hidden is not None
        hidden = self.run_layers(hidden, batch)
        return self.loss(hidden, batch) if self.last else hidden

    def run_layers(self, hidden: Tensor, batch: Batch, *, seen: int = 0) -> Tensor:
        """The chunk's layers; `seen` tokens before the batch's are in the attention layers' caches."""
        where = self.positions(batch, hidden.dtype, context=self.context.size > 1, seen=seen)
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(
                    layer, hidden, where, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
                )
            else:
                hidden = layer(hidden, where)
        return hidden

    def embed(self, batch: Batch) -> Tensor:
        """Tokens [B, S] -> hidden [S/t or S, B, H]."""
        hidden = self.embedding(batch.tokens.t())
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self.config.embedding_scale
        if self.config.position == "learned":
            hidden = hidden + self.position_embedding(batch)
        if self.config.embedding_norm:
            hidden = self.embedding_norm(hidden)
        return dropout(hidden, self.config.dropout, self.training, self.tensor, sharded=self.sequence)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [S/t or S, B, H] -> this rank's share of the logits [S, B, V/t]."""
        normed = self.final_norm(hidden)
        if self.config.tie_embeddings:
            return column_parallel(normed, self.embedding.weight, None, self.tensor, self.sequence)
        return self.output(normed)

    def _losses(self, hidden: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sum of mask * cross-entropy, mask * cross-entropy [S, B]) with all logits, or in chunks of positions."""
        weight = self.embedding.weight if self.config.tie_embeddings else self.output.weight
        z_loss = self.config.z_loss if self.training else 0.0
        chunk = self.parallel.loss_positions(labels.numel(), weight.shape[0], hidden.element_size())
        if chunk < labels.numel():
            loss = partial(
                vocabulary_parallel_linear_cross_entropy,
                labels=labels,
                mask=mask,
                axis=self.tensor,
                sequence_parallel=self.sequence,
                vocab_size=self.config.vocab_size,
                chunk=chunk,
                z_loss=z_loss,
            )
            normed = self.final_norm(hidden)
            return loss(normed, weight) if self.config.tie_embeddings else self.output(normed, instead=loss)
        losses = vocabulary_parallel_cross_entropy(
            self.logits(hidden),
            labels,
            self.tensor,
            vocab_size=self.config.vocab_size,
            z_loss=z_loss,
            inplace_backward=True,
        )
        losses = losses if mask is None else losses * mask
        return losses.sum(), losses

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over this rank's tokens, to run backward from and to report."""
        mask = None if batch.loss_mask is None else batch.loss_mask.t()
        total, per_token = self._losses(hidden, batch.labels.t(), mask)
        count = torch.full((), float(per_token.numel()), device=per_token.device) if mask is None else mask.sum()
        report = torch.stack([total.detach(), count])
        if batch.sources is not None:
            rows = per_token.detach().sum(0)
            full = torch.full_like(rows, float(per_token.shape[0]))
            report = torch.cat([report, rows, full if batch.loss_mask is None else batch.loss_mask.sum(1)])
        return total, report


def make_norm(
    config: ModelConfig,
    mesh: Mesh,
    parallel: ParallelConfig,
    name: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Norm:
    """A norm over the residual stream's width."""
    return Norm(
        config.norm,
        config.hidden_size,
        name=name,
        eps=config.norm_eps,
        bias=config.norm_bias,
        axis=mesh.tensor,
        sequence_parallel=parallel.sequence and mesh.tensor.size > 1,
        device=device,
        dtype=dtype,
    )
