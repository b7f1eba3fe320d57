"""One chunk of a decoder-only transformer: what a pipeline stage runs; a whole model is the chunk with every layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megalm.architecture.blocks import AttentionSpec, BlockSpec, LatentAttentionSpec, MixtureSpec, MLPSpec
from megalm.architecture.layers import (
    BLOCKS,
    LayerSpec,
    Specify,
    SublayerSpec,
    list_trained_layers,
    name_layer,
    specify_layers,
    specify_predictions,
)
from megalm.architecture.shape import resolve_shape
from megalm.config import ModelConfig
from megalm.data.batch import Batch
from megalm.model.attention import Attention
from megalm.model.auxiliary import Auxiliary
from megalm.model.head import Head
from megalm.model.latent_attention import LatentAttention
from megalm.model.mixture import Mixture
from megalm.model.mlp import MLP
from megalm.model.norm import make_norm
from megalm.model.positions import LearnedPositions, Positions, Where
from megalm.model.prediction import Prediction, Predictions
from megalm.model.recompute import keep_function_of
from megalm.parallel.embedding import VocabularyParallelEmbedding
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.random import apply_dropout

if TYPE_CHECKING:
    from megalm.objectives.objective import Objective


MODULES: dict[type[BlockSpec], Callable[..., nn.Module]] = {
    AttentionSpec: Attention,
    LatentAttentionSpec: LatentAttention,
    MLPSpec: MLP,
    MixtureSpec: Mixture,
}
"""The module that computes each kind of block: made of (spec, context, name), run on (x, where)."""


def register_block(
    sublayer: str, name: str, specify: Specify, spec: type[BlockSpec], module: Callable[..., nn.Module]
) -> None:
    """Let `model.blocks.SUBLAYER=NAME` put a block of your own into every layer.

    sublayer: attention or mlp. specify(model, usual) makes the block's spec of the one that would stand there; spec is its
    class, which derives from `AttentionSpec` or `MLPSpec`, so that the planner can count it. module(spec, context, name=...)
    computes it, run on (x, where). Errors: ValueError where the name is taken, or there is no such sublayer.
    """
    if sublayer not in BLOCKS:
        raise ValueError(f"sublayer {sublayer!r}: there are {', '.join(BLOCKS)}.")
    BLOCKS[sublayer].register(name, specify)
    MODULES[spec] = module


class Layer(nn.Module):
    """The sublayers of a spec around the residual stream; for attention and MLP, for example:

    pre:       h' = h + attention(norm(h));  y = h' + mlp(norm(h'))
    post:      h' = h + norm(attention(h));  y = h' + norm(mlp(h'))          (OLMo 2)
    both:      h' = h + norm2(attention(norm1(h)));  y = h' + norm4(mlp(norm3(h')))   (Gemma 2)
    parallel:  y = h + attention(norm(h)) + mlp(norm'(h))                     (GPT-NeoX; with one norm: Cohere)

    Shapes:  [S/t or S, B, H] -> the same
    """

    def __init__(
        self,
        spec: LayerSpec,
        context: LayerContext,
        *,
        index: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.sequence, self.tensor = context.sequence, context.tensor
        self.dropout = dropout
        self.recompute_norms = context.recompute_parts
        for sublayer in spec.sublayers:
            name = f"{name_layer(index)}.{sublayer.name}"
            for part, norm in ((sublayer.norm_name, sublayer.norm), (sublayer.output_norm_name, sublayer.output_norm)):
                if norm is not None:
                    self.add_module(part, make_norm(norm, context, name=f"{name_layer(index)}.{part}"))
            module = MODULES.get(type(sublayer.block))
            if module is None:
                raise ValueError(f"{name}: no module computes a {type(sublayer.block).__name__}; see MODULES")
            block = module(sublayer.block, context, name=name)
            self.add_module(sublayer.name, block)

    def forward(self, hidden: Tensor, where: Where) -> Tensor:
        if self.spec.parallel:
            return self._run_together(hidden, where)
        branch: Tensor | None = None  # what a sublayer gave: a norm on the next one's input adds it in the same kernel
        for sublayer in self.spec.sublayers:
            if branch is None:
                branch = self._run(sublayer, hidden, where)
            elif sublayer.norm_output:
                hidden = self._drop(branch, hidden)
                branch = self._run(sublayer, hidden, where)
            else:
                normed, hidden = getattr(self, sublayer.norm_name)(self._drop(branch), hidden)
                branch = self._consume(sublayer, normed, hidden, where)
        return hidden if branch is None else self._drop(branch, hidden)

    def _run_together(self, hidden: Tensor, where: Where) -> Tensor:
        """All sublayers on the layer's input; one without a norm reads what the first one's gave."""
        first, *others = self.spec.sublayers
        total = hidden
        normed = getattr(self, first.norm_name)(hidden)
        branch = self._consume(first, normed, hidden, where)
        for sublayer in others:
            total = total + self._drop(branch)
            if sublayer.norm is not None:
                branch = self._run(sublayer, hidden, where)
            else:
                branch = self._consume(sublayer, normed, hidden, where)
        return self._drop(branch, total)

    def _run(self, sublayer: SublayerSpec, hidden: Tensor, where: Where) -> Tensor:
        """A sublayer's output, not yet added to the stream."""
        norm = getattr(self, sublayer.norm_name)
        if sublayer.norm_output:
            return self._scale(norm(getattr(self, sublayer.name)(hidden, where)))
        return self._consume(sublayer, norm(hidden), hidden, where)

    def _consume(self, sublayer: SublayerSpec, normed: Tensor, hidden: Tensor, where: Where) -> Tensor:
        """Run the block on the normed stream; selective recomputation keeps the stream and norms it again."""
        block = getattr(self, sublayer.name)
        if self.recompute_norms:
            norm = sublayer.norm_name if sublayer.norm is not None else self.spec.sublayers[0].norm_name
            with keep_function_of(normed, partial(getattr(self, norm), hidden)):
                output = block(normed, where)
        else:
            output = block(normed, where)
        if sublayer.output_norm is not None:
            output = getattr(self, sublayer.output_norm_name)(output)
        return self._scale(output)

    def _scale(self, x: Tensor) -> Tensor:
        return x if self.spec.residual_scale == 1.0 else x * self.spec.residual_scale

    def _drop(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return apply_dropout(x, self.dropout, self.training, self.tensor, sharded=self.sequence, residual=residual)


class Transformer(nn.Module):
    """The layers `layers` of the model, with the embedding if `first`, and the head and the objective if `last`; in training
    also the layers that predict further tokens.

    Shapes:  tokens [B, S/c] or hidden [S/(c t) or S/c, B, H] -> (hidden, or on the last chunk the objective's total: a
             scalar to run backward from, a sum over this rank's tokens; named sums, fp32)
    Comm:    inside the tensor and context axes only
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        *,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        objective: "Objective | None" = None,
    ) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        self.objective = objective
        self.loss_scale: Tensor
        self.register_buffer("loss_scale", torch.ones((), device=context.device), persistent=False)
        self.sequence, self.tensor = context.sequence, context.tensor
        self.context = context.mesh.context
        self.parallel = context.parallel
        self.recompute_layers = context.parallel.recompute == "full"
        if first or last and (config.tie_embeddings or config.prediction.depth):
            self.embedding = VocabularyParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                context.tensor,
                name="embedding",
                init_std=config.init_std,
                **context.of_layers,
            )
        if first:
            if config.position == "learned":
                self.position_embedding = LearnedPositions(
                    config.seq_length,
                    config.hidden_size,
                    context.tensor,
                    name="position_embedding",
                    init_std=config.init_std,
                    **context.of_layers,
                )
            if config.embedding_norm:
                self.embedding_norm = make_norm(resolve_shape(config).norm, context, name="embedding_norm")
        self.positions = Positions(config, context.tensor, context.device)
        specs = specify_layers(config)
        self.numbers = layers if layers is not None else range(config.num_layers)
        """Which of the model's layers these are."""
        self.layers = nn.ModuleList(
            Layer(specs[index], context, index=index, dropout=config.dropout) for index in self.numbers
        )
        if last:
            self.head = Head(config, context, self.embedding if config.tie_embeddings else None)
            predictions = [
                Prediction(spec, context, Layer(spec, context, index=index, dropout=config.dropout), index=index)
                for index, spec in enumerate(specify_predictions(config), config.num_layers)
            ]
            self.predictions = Predictions(
                predictions,
                factor=config.prediction.loss,
                recompute=self.recompute_layers,
                dropout=config.dropout > 0,
            )

    def forward(
        self, x: Tensor | None, batch: Batch, objective: "Objective | None" = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """objective: computed of this pass' hidden states in place of the chunk's own."""
        hidden = self.embed(batch) if self.first else x
        assert hidden is not None
        auxiliary = Auxiliary(self.loss_scale, self.tensor.size)
        where = replace(self.positions(batch, context=self.context.size), auxiliary=auxiliary)
        hidden = self._run_layers(hidden, where)
        if not self.last:
            return hidden, auxiliary.sums
        if self.training:
            hidden = self.predictions.attach(hidden, self.head, self._look_up, batch, where, auxiliary)
        objective = objective or self.objective
        if objective is None:
            raise ValueError("a chunk that ends the model runs forward with an objective only: give it one")
        outcome = objective(self.head, hidden, batch)
        return outcome.total, {**auxiliary.sums, **outcome.sums}

    def run_layers(self, hidden: Tensor, batch: Batch, *, seen: int = 0) -> Tensor:
        """The chunk's layers; `seen` tokens before the batch's are in the attention layers' caches."""
        where = self.positions(batch, context=self.context.size, seen=seen)
        return self._run_layers(hidden, replace(where, auxiliary=Auxiliary(self.loss_scale, self.tensor.size)))

    def _run_layers(self, hidden: Tensor, where: Where) -> Tensor:
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(
                    layer, hidden, where, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
                )
            else:
                hidden = layer(hidden, where)
        return hidden

    @property
    def reported(self) -> dict[str, int]:
        """Names of the sums that the layers of the whole model report, alike on all ranks, with their numbers of values."""
        depth = self.config.prediction.depth
        sums = {"prediction_loss": depth, "prediction_tokens": depth} if depth else {}
        for index, layer in enumerate(list_trained_layers(self.config)):
            sums.update(layer.list_sums(name_layer(index) + "."))
        return sums

    def embed(self, batch: Batch) -> Tensor:
        """Tokens [B, S] -> hidden [S/t or S, B, H]."""
        hidden = self._look_up(batch.tokens)
        if self.config.position == "learned":
            hidden = hidden + self.position_embedding(batch)
        if self.config.embedding_norm:
            hidden = self.embedding_norm(hidden)
        return apply_dropout(hidden, self.config.dropout, self.training, self.tensor, sharded=self.sequence)

    def _look_up(self, tokens: Tensor) -> Tensor:
        """[B, S] -> the table's rows, [S/t or S, B, H]"""
        found = self.embedding(tokens.t())
        return found if self.config.embedding_scale == 1.0 else found * self.config.embedding_scale
