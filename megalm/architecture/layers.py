"""A spec for each layer of a model: which blocks it has, where norms stand, how their outputs join the stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megalm.architecture.blocks import (
    AttentionSpec,
    BalanceSpec,
    BlockSpec,
    LatentAttentionSpec,
    MergeSpec,
    MixtureSpec,
    MLPSpec,
    NormSpec,
    RouterSpec,
    Tensors,
)
from megalm.architecture.kept import cache_by_model
from megalm.architecture.positions import specify_rope
from megalm.architecture.shape import ModelShape, resolve_shape
from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig
from megalm.config.registry import Registry


@dataclass(frozen=True)
class SublayerSpec:
    """One block, its norm, and what both are called."""

    name: str
    block: BlockSpec
    norm: NormSpec | None
    """None: the block reads what the first sublayer's norm gave; in parallel layers only."""
    norm_output: bool = False
    """The norm stands on the block's output, before it is added to the stream; else on the block's input."""
    output_norm: NormSpec | None = None
    """A second norm, on the block's output where the first stands on its input."""

    @property
    def norm_name(self) -> str:
        """The norm's name, beside the block's."""
        return f"{self.name}_norm"

    @property
    def output_norm_name(self) -> str:
        """The second norm's name."""
        return f"{self.name}_output_norm"

    def list_tensors(self, prefix: str) -> Tensors:
        """Yield the tensors of the norms and of the block."""
        if self.norm is not None:
            yield from self.norm.list_tensors(prefix + self.norm_name)
        yield from self.block.list_tensors(prefix + self.name)
        if self.output_norm is not None:
            yield from self.output_norm.list_tensors(prefix + self.output_norm_name)


@dataclass(frozen=True)
class LayerSpec:
    """A layer: sublayers whose outputs are added to the residual stream."""

    sublayers: tuple[SublayerSpec, ...]
    parallel: bool = False
    """All sublayers read the layer's input; else each reads the stream that the one before it left."""
    residual_scale: float = 1.0
    """What each sublayer gives is multiplied by this before it is added."""

    def list_tensors(self, prefix: str = "") -> Tensors:
        """Yield (name, shape) of each parameter."""
        for sublayer in self.sublayers:
            yield from sublayer.list_tensors(prefix)

    def list_states(self, prefix: str = "") -> Tensors:
        """Yield (name, shape) of what is kept in a checkpoint and is no parameter."""
        for sublayer in self.sublayers:
            yield from sublayer.block.list_states(prefix + sublayer.name)

    def list_sums(self, prefix: str = "") -> dict[str, int]:
        """List names of what the layer reports of each step in training, with their numbers of values."""
        return {name: n for each in self.sublayers for name, n in each.block.list_sums(prefix + each.name).items()}

    @property
    def blocks(self) -> Iterator[BlockSpec]:
        """Yield the sublayers' blocks."""
        return (sublayer.block for sublayer in self.sublayers)

    @cached_property
    def attention(self) -> AttentionSpec:
        """The layer's attention. Errors: ValueError where it has not exactly one."""
        (found,) = (block for block in self.blocks if isinstance(block, AttentionSpec))
        return found

    @cached_property
    def mlp(self) -> MLPSpec | MixtureSpec:
        """The layer's MLP or mixture. Errors: ValueError where it has not exactly one."""
        (found,) = (block for block in self.blocks if isinstance(block, (MLPSpec, MixtureSpec)))
        return found


Specify = Callable[[ModelConfig, BlockSpec], BlockSpec]
"""Makes a block's spec of the model and of the spec that would stand in its place."""

BLOCKS: dict[str, Registry[Specify]] = {
    name: Registry("block", f"model.blocks.{name}") for name in ("attention", "mlp")
}
"""Blocks of plugins, by the sublayer that they may stand in."""


def choose_block(sublayer: str, model: ModelConfig, usual: BlockSpec) -> BlockSpec:
    """Choose the usual block of a sublayer, or the one that `model.blocks` names. Errors: ConfigError for an unknown name."""
    unknown = sorted(set(model.blocks) - set(BLOCKS))
    if unknown:
        raise ConfigError(f"model.blocks.{unknown[0]}: there is no such sublayer. Known are {', '.join(BLOCKS)}.")
    return BLOCKS[sublayer].find(model.blocks[sublayer])(model, usual) if sublayer in model.blocks else usual


@dataclass(frozen=True, kw_only=True)
class PredictionSpec(LayerSpec):
    """A layer that predicts one token further ahead: before it the hidden state and the embedding of the token so far ahead
    are normed and merged, behind it stands a norm of its own. Embedding and output matrix are the model's."""

    merge: MergeSpec
    norm: NormSpec
    """Of all three norms."""

    def list_tensors(self, prefix: str = "") -> Tensors:
        yield from self.norm.list_tensors(prefix + "embedding_norm")
        yield from self.norm.list_tensors(prefix + "hidden_norm")
        yield from self.merge.list_tensors(prefix + "merge")
        yield from super().list_tensors(prefix)
        yield from self.norm.list_tensors(prefix + "final_norm")

    @property
    def blocks(self) -> Iterator[BlockSpec]:
        """Yield what is merged and the sublayers' blocks."""
        yield self.merge
        yield from super().blocks


def name_layer(index: int) -> str:
    """The global name of a layer, in front of its tensors' names."""
    return f"layers.{index}"


def is_of_prediction(name: str, num_layers: int) -> bool:
    """Whether a tensor belongs to a layer behind the last of a model's `num_layers`: one that predicts further tokens."""
    kind, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return kind == "layers" and number.isdigit() and int(number) >= num_layers


@cache_by_model
def specify_layers(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """A spec for each layer of the model."""
    shape = resolve_shape(model)
    made: dict[tuple[str, bool], LayerSpec] = {}
    layers = []
    for index in range(shape.num_layers):
        word, is_dense = model.attends(index), model.moe.is_dense(index)
        if (word, is_dense) not in made:
            usual = _specify_mlp(model, shape.ffn_hidden_size) if is_dense else _specify_mixture(model, shape)
            block = choose_block("mlp", model, usual)
            mlp = _specify_sublayer(model, shape, "mlp", block)
            if model.shared_norm:
                mlp = replace(mlp, norm=None)
            attention = _specify_sublayer(
                model, shape, "attention", choose_block("attention", model, _specify_attention(model, shape, word))
            )
            made[word, is_dense] = LayerSpec((attention, mlp), model.parallel_residual, model.residual_scale)
        layers.append(made[word, is_dense])
    return tuple(layers)


@cache_by_model
def specify_predictions(model: ModelConfig) -> tuple[PredictionSpec, ...]:
    """A spec for each layer that predicts a further token: of the last layer's kind, and numbered on behind it."""
    if not model.prediction.depth:
        return ()
    last = specify_layers(model)[-1]
    merge, norm = MergeSpec(model.hidden_size, model.init_std), resolve_shape(model).norm
    made = PredictionSpec(last.sublayers, last.parallel, last.residual_scale, merge=merge, norm=norm)
    return (made,) * model.prediction.depth


def list_trained_layers(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """List the specs of all layers by number: those of the model, and behind them those that predict further tokens."""
    return specify_layers(model) + specify_predictions(model)


def _specify_sublayer(model: ModelConfig, shape: ModelShape, name: str, block: BlockSpec) -> SublayerSpec:
    placement = model.norm_placement
    return SublayerSpec(name, block, shape.norm, placement == "post", shape.norm if placement == "both" else None)


@cache_by_model
def find_shared_layer(model: ModelConfig) -> LayerSpec:
    """Find the spec that all layers share, for who prices one layer and multiplies. Errors: ValueError where they differ."""
    first, *others = specify_layers(model)
    if any(other != first for other in others):
        raise ValueError("the layers of this model differ: ask for specify_layers and add them up")
    return first


def _specify_attention(model: ModelConfig, shape: ModelShape, word: str) -> AttentionSpec:
    """The attention that a word of model.layer_pattern names."""
    offset, own_window = model.norm_unit_offset, word.startswith("window")
    query_norm = key_norm = None
    widths = tuple(heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads))
    if model.qk_norm and model.qk_norm_scope == "head":
        query_norm = key_norm = NormSpec(model.norm, shape.head_dim, model.norm_eps, scope="head", unit_offset=offset)
    elif model.qk_norm:
        kind, scope = ("rmsnorm", "heads") if model.qk_norm_scope == "full" else (model.norm, "each")
        query_norm, key_norm = (
            NormSpec(kind, width, model.norm_eps, scope=scope, unit_offset=offset) for width in widths
        )
    rope, latent = None, model.latent
    if model.position == "rope" and not word.endswith("_no_rope"):
        size = latent.rope_dim if latent.key_rank else int(shape.head_dim * model.rope_fraction)
        rope = specify_rope(model, size, window=own_window)
    attention = AttentionSpec(
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        position="none" if model.position == "rope" and rope is None else model.position,
        rope=rope,
        window=model.window if own_window else None,
        scale=model.attention_scale or shape.head_dim**-0.5,
        softcap=model.attention_softcap,
        sinks=model.attention_sinks,
        qkv_bias=model.qkv_bias,
        output_bias=model.attention_out_bias,
        query_norm=query_norm,
        key_norm=key_norm,
        clip_qkv=model.clip_qkv,
        init_std=model.init_std,
        output_init_std=_output_init_std(model),
    )
    if not latent.key_rank:
        return attention
    norms = [
        NormSpec(model.norm, size, model.norm_eps, unit_offset=offset) if size else None
        for size in (latent.query_rank, latent.key_rank)
    ]
    assert norms[1] is not None
    return LatentAttentionSpec(
        **vars(attention),
        query_rank=latent.query_rank,
        key_rank=latent.key_rank,
        plain_dim=latent.plain_dim,
        rope_dim=latent.rope_dim,
        value_dim=latent.value_dim,
        query_down_norm=norms[0],
        key_value_norm=norms[1],
    )


def _specify_mlp(model: ModelConfig, width: int) -> MLPSpec:
    return MLPSpec(
        hidden_size=model.hidden_size,
        ffn_hidden_size=width,
        activation=model.activation,
        activation_limit=model.activation_limit,
        bias=model.linear_bias,
        init_std=model.init_std,
        output_init_std=_output_init_std(model),
    )


def _specify_mixture(model: ModelConfig, shape: ModelShape) -> MixtureSpec:
    moe = model.moe
    router = RouterSpec(
        hidden_size=model.hidden_size,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        score=moe.score,
        weight_norm=moe.weight_norm,
        weight_scale=moe.weight_scale,
        groups=moe.groups,
        top_groups=moe.top_groups,
        group_scores=moe.group_scores,
        bias=moe.router_bias,
        selection_bias=shape.selection_bias,
        init_std=model.init_std,
    )
    return MixtureSpec(
        expert=_specify_mlp(model, shape.expert_ffn_hidden_size),
        router=router,
        shared=_specify_mlp(model, shape.shared_ffn_hidden_size) if shape.shared_ffn_hidden_size else None,
        shared_gate=moe.shared_gate,
        balance=BalanceSpec(moe.balance, moe.balance_loss, moe.z_loss, moe.bias_rate),
    )


def _output_init_std(model: ModelConfig) -> float:
    return model.init_std / (2 * model.num_layers) ** 0.5 if model.scaled_init else model.init_std
