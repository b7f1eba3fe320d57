"""Every tensor of a model with its shape, and the counts that follow from them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from megalm.architecture.blocks import Tensors
from megalm.architecture.layers import layer_name, layers_of
from megalm.architecture.shape import ModelShape, shape_of
from megalm.config.model import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Exact parameter counts of a model."""

    total: int
    """All parameters."""
    active: int
    """Parameters that one token passes through: all of them in a dense model, top_k experts of a MoE layer."""
    embedding: int
    """Token, position and (untied) output embeddings together."""
    layer: int
    """One transformer layer, the largest."""
    tensors: list[tuple[str, tuple[int, ...]]] = field(repr=False)
    """(global name, global shape) of each tensor."""

    @property
    def non_embedding(self) -> int:
        """Parameters outside the embeddings (Kaplan et al. 2020's N)."""
        return self.total - self.embedding


def tensors(model: ModelConfig) -> Tensors:
    """Yield (global name, shape) of each parameter in the order in which a token meets them."""
    shape = shape_of(model)
    yield from front_tensors(shape)
    for index, layer in enumerate(layers_of(model)):
        yield from layer.tensors(layer_name(index) + ".")
    yield from back_tensors(shape)


def embedding_tensor(shape: ModelShape) -> tuple[str, tuple[int, ...]]:
    """The embedding, which the last stage has as well where it is tied to the output."""
    return "embedding.weight", (shape.vocab_size, shape.hidden_size)


def front_tensors(shape: ModelShape) -> Tensors:
    """Yield the tensors in front of the layers: the first pipeline stage's."""
    yield embedding_tensor(shape)
    if shape.learned_positions:
        yield "position_embedding.weight", (shape.seq_length, shape.hidden_size)
    if shape.embedding_norm:
        yield from shape.norm.tensors("embedding_norm")


def back_tensors(shape: ModelShape) -> Tensors:
    """Yield the tensors behind the layers: the last pipeline stage's, beside a tied embedding."""
    yield from shape.norm.tensors("final_norm")
    if not shape.tie_embeddings:
        yield "output.weight", (shape.vocab_size, shape.hidden_size)


def parameters(model: ModelConfig) -> ParameterCounts:
    """Count a model's parameters exactly, tensor by tensor."""
    every, layers = list(tensors(model)), layers_of(model)
    idle = sum(elements(block.tensors("")) - elements(block.used_tensors("")) for one in layers for block in one.blocks)
    return ParameterCounts(
        total=elements(every),
        active=elements(every) - idle,
        embedding=elements(entry for entry in every if is_embedding(entry[0])),
        layer=max(elements(layer.tensors()) for layer in set(layers)),
        tensors=every,
    )


def elements(found: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Numbers in all of these tensors."""
    return sum(prod(shape) for _, shape in found)


def is_embedding(name: str) -> bool:
    """Whether a global name is one of the token, position or output embeddings."""
    return name in ("embedding.weight", "position_embedding.weight", "output.weight")
