"""Every tensor of a model with its shape, and the counts that follow from them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from megalm.config import ModelConfig

Shape = tuple[int, ...]


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
    """One transformer layer."""
    tensors: list[tuple[str, Shape]] = field(repr=False)
    """(global name, global shape) of each tensor."""

    @property
    def non_embedding(self) -> int:
        """Parameters outside the embeddings (Kaplan et al. 2020's N)."""
        return self.total - self.embedding


def tensors(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Yield (global name, shape) of each parameter in the order in which a token meets them."""
    hidden = model.hidden_size
    yield "embedding.weight", (model.vocab_size, hidden)
    if model.position == "learned":
        yield "position_embedding.weight", (model.seq_length, hidden)
    if model.embedding_norm:
        yield from _norm(model, "embedding_norm", hidden)
    for index in range(model.num_layers):
        yield from layer_tensors(model, f"layers.{index}.")
    yield from _norm(model, "final_norm", hidden)
    if not model.tie_embeddings:
        yield "output.weight", (model.vocab_size, hidden)


def layer_tensors(model: ModelConfig, prefix: str = "") -> Iterator[tuple[str, Shape]]:
    """Yield (name, shape) of each parameter of one layer."""
    hidden = model.hidden_size
    query, key = query_width(model), key_width(model)
    yield from _norm(model, prefix + "attention_norm", hidden)
    for name, width in (("query", query), ("key", key), ("value", key)):
        yield from _linear(f"{prefix}attention.{name}", width, hidden, model.qkv_bias)
    if model.qk_norm:
        full = model.qk_norm_scope == "full"
        yield prefix + "attention.query_norm.weight", (query if full else head_dim(model),)
        yield prefix + "attention.key_norm.weight", (key if full else head_dim(model),)
    yield from _linear(prefix + "attention.output", hidden, query, model.attention_out_bias)
    yield from _norm(model, prefix + "mlp_norm", hidden)
    if not model.moe.num_experts:
        yield from _mlp(model, prefix + "mlp", ffn_width(model))
        return
    yield prefix + "mlp.router.weight", (model.moe.num_experts, hidden)
    width = model.moe.ffn_hidden_size or ffn_width(model)
    for expert in range(model.moe.num_experts):
        yield from _mlp(model, f"{prefix}mlp.experts.{expert}", width)
    for expert in range(model.moe.num_shared_experts):
        yield from _mlp(model, f"{prefix}mlp.shared_experts.{expert}", width)


def parameters(model: ModelConfig) -> ParameterCounts:
    """Count a model's parameters exactly, tensor by tensor."""
    every = list(tensors(model))
    total = sum(prod(shape) for _, shape in every)
    embedding = sum(prod(shape) for name, shape in every if is_embedding(name))
    layer = sum(prod(shape) for _, shape in layer_tensors(model))
    idle = 0
    if model.moe.num_experts:
        one_expert = sum(prod(shape) for _, shape in _mlp(model, "", model.moe.ffn_hidden_size or ffn_width(model)))
        idle = model.num_layers * (model.moe.num_experts - model.moe.top_k) * one_expert
    return ParameterCounts(total, total - idle, embedding, layer, every)


def is_embedding(name: str) -> bool:
    """Whether a global name is one of the token, position or output embeddings."""
    return name in ("embedding.weight", "position_embedding.weight", "output.weight")


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_heads


def query_width(model: ModelConfig) -> int:
    """Features of all query heads together."""
    return model.num_heads * head_dim(model)


def key_width(model: ModelConfig) -> int:
    """Features of all key (and of all value) heads together."""
    return (model.num_kv_heads or model.num_heads) * head_dim(model)


def ffn_width(model: ModelConfig) -> int:
    """Hidden width of the dense MLP."""
    if model.ffn_hidden_size is None:
        model.fill_in()
    assert model.ffn_hidden_size is not None
    return model.ffn_hidden_size


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", (rows, columns)
    if bias:
        yield name + ".bias", (rows,)


def _norm(model: ModelConfig, name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", (size,)
    if model.norm == "layernorm" and model.norm_bias:
        yield name + ".bias", (size,)


def _mlp(model: ModelConfig, name: str, width: int) -> Iterator[tuple[str, Shape]]:
    for part in ("gate", "up") if model.gated else ("up",):
        yield from _linear(f"{name}.{part}", width, model.hidden_size, model.linear_bias)
    yield from _linear(name + ".down", model.hidden_size, width, model.linear_bias)
