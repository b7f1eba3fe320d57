"""A spec for each layer of a model: which blocks it has, where norms stand, how their outputs join the stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megalm.architecture.blocks import AttentionSpec, BlockSpec, MixtureSpec, MLPSpec, NormSpec, Tensors
from megalm.architecture.kept import cache_by_model
from megalm.architecture.shape import ModelShape, shape_of
from megalm.config.model import ModelConfig


@dataclass(frozen=True)
class SublayerSpec:
    """One block, its norm, and what both are called."""

    name: str
    block: BlockSpec
    norm: NormSpec
    norm_output: bool = False
    """The norm stands on the block's output, before it is added to the stream; else on the block's input."""

    @property
    def norm_name(self) -> str:
        """The norm's name, beside the block's."""
        return f"{self.name}_norm"

    def list_tensors(self, prefix: str) -> Tensors:
        """Yield the tensors of the norm and of the block."""
        yield from self.norm.list_tensors(prefix + self.norm_name)
        yield from self.block.list_tensors(prefix + self.name)


@dataclass(frozen=True)
class LayerSpec:
    """A layer: sublayers whose outputs are added to the residual stream."""

    sublayers: tuple[SublayerSpec, ...]
    parallel: bool = False
    """All sublayers read the layer's input; else each reads the stream that the one before it left."""

    def list_tensors(self, prefix: str = "") -> Tensors:
        """Yield (name, shape) of each parameter."""
        for sublayer in self.sublayers:
            yield from sublayer.list_tensors(prefix)

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


def name_layer(index: int) -> str:
    """The global name of a layer, in front of its tensors' names."""
    return f"layers.{index}"


@cache_by_model
def layers_of(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """A spec for each layer of the model."""
    shape = shape_of(model)
    attention = SublayerSpec("attention", _specify_attention(model, shape), shape.norm, model.norm_placement == "post")
    mlp = SublayerSpec("mlp", _specify_mlp(model, shape), shape.norm, model.norm_placement == "post")
    return (LayerSpec((attention, mlp), model.parallel_residual),) * shape.num_layers


@cache_by_model
def find_shared_layer(model: ModelConfig) -> LayerSpec:
    """The spec that all layers share, for who prices one layer and multiplies. Errors: ValueError where they differ."""
    first, *others = layers_of(model)
    if any(other != first for other in others):
        raise ValueError("the layers of this model differ: ask for layers_of and add them up")
    return first


def _specify_attention(model: ModelConfig, shape: ModelShape) -> AttentionSpec:
    query_norm = key_norm = None
    if model.qk_norm and model.qk_norm_scope == "head":
        query_norm = key_norm = NormSpec(model.norm, shape.head_dim, model.norm_eps, scope="head")
    elif model.qk_norm:
        widths = (heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads))
        query_norm, key_norm = (NormSpec("rmsnorm", width, model.norm_eps, scope="heads") for width in widths)
    return AttentionSpec(
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        position=model.position,
        rope_interleaved=model.rope_interleaved,
        qkv_bias=model.qkv_bias,
        output_bias=model.attention_out_bias,
        query_norm=query_norm,
        key_norm=key_norm,
        clip_qkv=model.clip_qkv,
        init_std=model.init_std,
        output_init_std=_output_init_std(model),
    )


def _specify_mlp(model: ModelConfig, shape: ModelShape) -> MLPSpec | MixtureSpec:
    experts = model.moe.num_experts
    mlp = MLPSpec(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.expert_ffn_hidden_size if experts else shape.ffn_hidden_size,
        activation=model.activation,
        bias=model.linear_bias,
        init_std=model.init_std,
        output_init_std=_output_init_std(model),
    )
    if not experts:
        return mlp
    return MixtureSpec(mlp, experts, model.moe.top_k, model.moe.num_shared_experts)


def _output_init_std(model: ModelConfig) -> float:
    return model.init_std / (2 * model.num_layers) ** 0.5 if model.scaled_init else model.init_std
