"""A layer behind the last one that predicts a token further ahead, and what these layers add to the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megalm.architecture.layers import PredictionSpec, name_layer
from megalm.data.batch import Batch
from megalm.model.auxiliary import Auxiliary, attach_loss
from megalm.model.head import Head
from megalm.model.norm import make_norm
from megalm.model.positions import Where
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ReplicatedLinear


class Prediction(nn.Module):
    """h_d = norm(layer(W [norm(e); norm(h_{d-1})])): of the state that predicts the token d ahead, and that token's embedding
    e, the state that predicts the one after it. h_0 is what the final norm gave.

    W is whole on every tensor rank; under sequence parallelism each has its own positions, and W's gradient is summed.

    Shapes:  hidden, embedded [S/t or S, B, H] -> the same;  W [H, 2 H]
    Comm:    the layer's
    Source:  DeepSeek-V3 (arXiv:2412.19437), section 2.2; order of the columns and place of the norms as in the released
             weights (`enorm`, `hnorm`, `eh_proj`, `shared_head.norm`), which continue from the normed state
    """

    def __init__(self, spec: PredictionSpec, context: LayerContext, layer: nn.Module, *, index: int) -> None:
        """layer: of `spec`, and number `index`."""
        super().__init__()
        name = name_layer(index)
        self.embedding_norm = make_norm(spec.norm, context, name=f"{name}.embedding_norm")
        self.hidden_norm = make_norm(spec.norm, context, name=f"{name}.hidden_norm")
        self.merge = ReplicatedLinear(
            2 * spec.merge.hidden_size,
            spec.merge.hidden_size,
            context.tensor,
            name=f"{name}.merge",
            init_std=spec.merge.init_std,
            product=context.product(f"{name}.merge"),
            **context.of_layers,
        )
        self.layer = layer
        self.final_norm = make_norm(spec.norm, context, name=f"{name}.final_norm")

    def forward(self, hidden: Tensor, embedded: Tensor, where: Where) -> Tensor:
        merged = self.merge(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], -1))
        return self.final_norm(self.layer(merged, where))


class Predictions(nn.ModuleList):
    """The layers of all depths, one behind the other, and their loss.

        loss = factor / depths x sum over d, i of weight_{i+d} cross-entropy(head(h_d)_i, label_{i+d})

    It is divided as the objective is, by the tokens that count in the next token's prediction, as in the paper: the same on
    every layout and for every number of micro-batches.

    factor: `model.prediction.loss`. recompute: each layer again in backward; dropout: with the same random numbers.
    """

    def __init__(self, layers: list[Prediction], *, factor: float, recompute: bool, dropout: bool) -> None:
        super().__init__(layers)
        self.factor, self.recompute, self.dropout = factor, recompute, dropout

    def attach(
        self, hidden: Tensor, head: Head, embed: Callable[[Tensor], Tensor], batch: Batch, where: Where, own: Auxiliary
    ) -> Tensor:
        """The stream that the head reads, with the loss on it; reported are, for each depth, its losses' sum and its tokens.

        Errors: ValueError for a batch that was not made to look ahead.
        """
        if not len(self):
            return hidden
        if batch.further_labels is None or batch.further_mask is None:
            raise ValueError(f"the model predicts {len(self)} further tokens: give it batch.look_ahead({len(self)})")
        state = head.final_norm(hidden)
        further = batch.labels, *batch.further_labels.unbind(-1)
        masks = batch.further_mask.unbind(-1)
        losses = []
        for layer, token, label, mask in zip(self, further[:-1], further[1:], masks, strict=True):
            state = self._run(layer, state, embed(token), where)
            losses.append(head.losses_of_normed(state, label.t(), mask.t())[0])
        total = torch.stack(losses)
        own.report("prediction_loss", total)
        own.report("prediction_tokens", torch.stack([mask.sum() for mask in masks]))
        return attach_loss(hidden, total * (self.factor / len(self)), own.scale)

    def _run(self, layer: nn.Module, state: Tensor, embedded: Tensor, where: Where) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return layer(state, embedded, where)
        return torch.utils.checkpoint.checkpoint(
            layer, state, embedded, where, use_reentrant=False, preserve_rng_state=self.dropout
        )
