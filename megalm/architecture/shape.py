"""The resolved shape of a model: what its configuration leaves to a default is a number here."""

from dataclasses import dataclass, replace

from megalm.architecture.blocks import NormSpec
from megalm.architecture.kept import cache_by_model
from megalm.config.model import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes that belong to the model as a whole, and what stands before and behind its layers."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    seq_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    expert_ffn_hidden_size: int
    shared_ffn_hidden_size: int
    """Hidden features beside the experts that every token passes through; 0: none."""
    selection_bias: bool
    """A mixture's choice has a bias that follows the load."""
    norm: NormSpec
    """The norm over the residual stream."""
    embedding_norm: bool
    """A norm right after the embedding."""
    learned_positions: bool
    """A vector for each position is added to the embedding."""
    tie_embeddings: bool
    """The output matrix is the embedding's."""
    value_head: bool
    """A number for each token, beside the logits."""


@cache_by_model
def resolve_shape(model: ModelConfig) -> ModelShape:
    """Resolve a model's configuration, which is left as it was."""
    full = replace(model, moe=replace(model.moe))
    full.fill_in()
    assert full.num_kv_heads and full.head_dim and full.ffn_hidden_size and full.moe.ffn_hidden_size
    return ModelShape(
        num_layers=full.num_layers,
        hidden_size=full.hidden_size,
        vocab_size=full.vocab_size,
        seq_length=full.seq_length,
        num_heads=full.num_heads,
        num_kv_heads=full.num_kv_heads,
        head_dim=full.head_dim,
        ffn_hidden_size=full.ffn_hidden_size,
        expert_ffn_hidden_size=full.moe.ffn_hidden_size,
        shared_ffn_hidden_size=full.moe.shared_ffn_hidden_size or 0,
        selection_bias=bool(full.moe.selection_bias),
        norm=NormSpec(
            full.norm,
            full.hidden_size,
            full.norm_eps,
            bias=full.norm == "layernorm" and full.norm_bias,
            unit_offset=full.norm_unit_offset,
        ),
        embedding_norm=full.embedding_norm,
        learned_positions=full.position == "learned",
        tie_embeddings=full.tie_embeddings,
        value_head=full.value_head,
    )
