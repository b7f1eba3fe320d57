"""Every tensor of a model with its shape, and the counts that follow from them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from megalm.architecture.blocks import Tensors
from megalm.architecture.layers import list_trained_layers, name_layer, specify_layers, specify_predictions
from megalm.architecture.shape import ModelShape, resolve_shape
from megalm.config.model import ModelConfig

VALUE_HEAD = "value_head.weight"


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
    prediction: int
    """Of layers that predict further tokens, which are in `total` and `active`; generation has no use for them."""
    tensors: list[tuple[str, tuple[int, ...]]] = field(repr=False)
    """(global name, global shape) of each tensor."""

    @property
    def non_embedding(self) -> int:
        """Parameters outside the embeddings (Kaplan et al. 2020's N)."""
        return self.total - self.embedding


def list_tensors(model: ModelConfig) -> Tensors:
    """Yield (global name, shape) of each parameter in the order in which a token meets them."""
    shape = resolve_shape(model)
    yield from list_front_tensors(shape)
    for index, layer in enumerate(specify_layers(model)):
        yield from layer.list_tensors(name_layer(index) + ".")
    yield from list_back_tensors(shape)
    for index, layer in enumerate(specify_predictions(model), model.num_layers):
        yield from layer.list_tensors(name_layer(index) + ".")


def list_states(model: ModelConfig) -> Tensors:
    """Yield (global name, shape) of what is kept in a checkpoint beside the parameters."""
    for index, layer in enumerate(list_trained_layers(model)):
        yield from layer.list_states(name_layer(index) + ".")


def describe_embedding_tensor(shape: ModelShape) -> tuple[str, tuple[int, ...]]:
    """Describe the embedding, which the last stage has as well where it is tied to the output."""
    return "embedding.weight", (shape.vocab_size, shape.hidden_size)


def list_front_tensors(shape: ModelShape) -> Tensors:
    """Yield the tensors in front of the layers: the first pipeline stage's."""
    yield describe_embedding_tensor(shape)
    if shape.learned_positions:
        yield "position_embedding.weight", (shape.seq_length, shape.hidden_size)
    if shape.embedding_norm:
        yield from shape.norm.list_tensors("embedding_norm")


def list_back_tensors(shape: ModelShape) -> Tensors:
    """Yield the tensors behind the layers: the last pipeline stage's, beside a tied embedding."""
    yield from shape.norm.list_tensors("final_norm")
    if not shape.tie_embeddings:
        yield "output.weight", (shape.vocab_size, shape.hidden_size)
    if shape.value_head:
        yield VALUE_HEAD, (1, shape.hidden_size)


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count a model's parameters exactly, tensor by tensor."""
    every, layers = list(list_tensors(model)), list_trained_layers(model)
    idle = sum(
        count_elements(block.list_tensors("")) - count_elements(block.list_used_tensors(""))
        for one in layers
        for block in one.blocks
    )
    return ParameterCounts(
        total=count_elements(every),
        active=count_elements(every) - idle,
        embedding=count_elements(entry for entry in every if is_embedding(entry[0])),
        layer=max(count_elements(layer.list_tensors()) for layer in set(specify_layers(model))),
        prediction=sum(count_elements(layer.list_tensors()) for layer in specify_predictions(model)),
        tensors=every,
    )


def count_elements(found: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Count numbers in all of these tensors."""
    return sum(prod(shape) for _, shape in found)


def is_added(name: str) -> bool:
    """Whether a tensor may be new to a model whose other weights are trained already."""
    return name == VALUE_HEAD


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a map between hidden spaces: no table, output matrix, norm, bias or router."""
    return (
        len(shape) == 2
        and name.startswith("layers.")
        and not any(part in name for part in (".router.", ".shared_gate."))
    )


def is_embedding(name: str) -> bool:
    """Whether a global name is one of the token, position or output embeddings."""
    return name in ("embedding.weight", "position_embedding.weight", "output.weight")
