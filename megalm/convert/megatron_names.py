"""The tensors of Megatron-LM models, as rules over megalm's global names, and the generations of their spelling.

The table uses one spelling, `plain`: Megatron core's names with norms as layers of their own. What is read is brought
to it by `spell_plainly`; what is written is brought from it by `spell`.

    te              core with Transformer Engine: a norm's weights lie in the linear layer it feeds
    plain           core without
    legacy          before core, version 0.4 and later: input_norm, post_attention_norm, final_norm
    legacy-2.6      before core, version 2.6 to 3.0: input_layernorm, post_attention_layernorm, final_layernorm
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megalm.architecture.layers import name_layer
from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.huggingface_names import Shapes
from megalm.convert.rules import Part, Rule, order_gated_rows, order_grouped_rows

OUTPUT = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"

# Stored beside the weights and recomputed from the configuration.
RECOMPUTED = re.compile(r"(_extra_state\d*|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)$")

_TO_PLAIN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(module\.|model\.)+", ""),
        (r"^language_model\.", ""),
        (r"^(encoder|transformer)\.", "decoder."),
        (r"^word_embeddings_for_head\.", "output_layer."),
        (r"\.attention\.", ".self_attention."),
        (r"\.query_key_value\.", ".linear_qkv."),
        (r"self_attention\.dense\.", "self_attention.linear_proj."),
        (r"\.dense_h_to_4h\.", ".linear_fc1."),
        (r"\.dense_4h_to_h\.", ".linear_fc2."),
        (r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r"input_layernorm.\1"),
        (r"mlp\.linear_fc1\.layer_norm_(weight|bias)$", r"pre_mlp_layernorm.\1"),
        (r"\.input_norm\.", ".input_layernorm."),
        (r"\.post_attention_(norm|layernorm)\.", ".pre_mlp_layernorm."),
        (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    )
]

_FROM_PLAIN = {
    "te": (
        (r"\.input_layernorm\.(weight|bias)$", r".self_attention.linear_qkv.layer_norm_\1"),
        (r"\.pre_mlp_layernorm\.(weight|bias)$", r".mlp.linear_fc1.layer_norm_\1"),
    ),
    "plain": (),
    "legacy": (
        (r"^decoder\.", "encoder."),
        (r"\.linear_qkv\.", ".query_key_value."),
        (r"\.linear_proj\.", ".dense."),
        (r"\.linear_fc1\.", ".dense_h_to_4h."),
        (r"\.linear_fc2\.", ".dense_4h_to_h."),
        (r"\.input_layernorm\.", ".input_norm."),
        (r"\.pre_mlp_layernorm\.", ".post_attention_norm."),
        (r"\.final_layernorm\.", ".final_norm."),
    ),
}
_FROM_PLAIN["legacy-2.6"] = (*_FROM_PLAIN["legacy"][:5], (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."))


def spell_plainly(name: str) -> str:
    """Turn a stored name of any generation into the plain spelling."""
    for pattern, replacement in _TO_PLAIN:
        name = pattern.sub(replacement, name)
    return name


def spell(name: str, spelling: str) -> str:
    """Turn a plain name into the given spelling."""
    for pattern, replacement in _FROM_PLAIN[spelling]:
        name = re.sub(pattern, replacement, name)
    return name


def count_padded_rows(vocab_size: int, multiple: int, tensor: int) -> int:
    """Work out the embedding's rows: the next multiple of `multiple` x tensor-parallel ranks."""
    step = multiple * tensor
    return -(-vocab_size // step) * step


def make_megatron_rules(model: ModelConfig, *, tensor: int, padded_vocab_size: int, version: float = 3.0) -> list[Rule]:
    """Make the table for `tensor` tensor-parallel ranks. Each rank holds its equal part of a foreign tensor's `dim`.

    `version` is the checkpoint_version: below 2 the rows of query, key and value lie in another order.
    """
    shapes = Shapes(model)
    if shapes.kv_heads % tensor or shapes.heads % tensor or shapes.ffn % tensor or padded_vocab_size % tensor:
        raise ConfigError(
            f"{tensor} tensor-parallel ranks cannot divide {shapes.heads} query heads, {shapes.kv_heads} key/value heads, "
            f"{shapes.ffn} MLP features and {padded_vocab_size} vocabulary rows evenly; choose a divisor of them all"
        )
    return list(_rules(model, shapes, tensor, padded_vocab_size, version))


def _rules(model: ModelConfig, shapes: Shapes, tensor: int, padded: int, version: float) -> Iterator[Rule]:
    yield Rule(EMBEDDING, (shapes.weight("embedding"),), pad_to=padded, dim=0)
    if model.position == "learned":
        positions = shapes.weight("position_embedding")
        yield Rule("embedding.position_embeddings.weight", (positions,))
    qkv_rows = partial(_qkv_rows, shapes, tensor, version)
    fc1_rows = partial(order_gated_rows, shapes.ffn, tensor) if model.gated and tensor > 1 else None
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}"
        yield from _norm(f"{prefix}.input_layernorm", shapes.norm(layer, "attention"))
        yield from _divided(f"{prefix}.self_attention.linear_qkv", shapes.query_key_value(layer), 0, qkv_rows)
        for name, part in shapes.qk_norms(layer).items():
            yield Rule(f"{prefix}.self_attention.{name[0]}_layernorm.weight", (part,))
        yield from _divided(f"{prefix}.self_attention.linear_proj", [shapes.attention(layer, "output")], 1)
        yield from _norm(f"{prefix}.pre_mlp_layernorm", shapes.norm(layer, "mlp"))
        if model.moe.is_dense(layer):
            yield from _mlp(f"{prefix}.mlp", f"{name_layer(layer)}.mlp", shapes, fc1_rows)
        else:
            yield from _mixture(f"{prefix}.mlp", f"{name_layer(layer)}.mlp", shapes)
    yield from _norm("decoder.final_layernorm", shapes.parts("final_norm"))
    if not model.tie_embeddings:
        yield Rule(OUTPUT, (shapes.weight("output"),), pad_to=padded, dim=0)


def _mlp(foreign: str, own: str, shapes: Shapes, rows: Callable[[], Tensor] | None = None) -> Iterator[Rule]:
    """Yield the rules of an MLP, an expert or the shared expert: gate and up together, and down."""
    first = [shapes.parts(f"{own}.{name}") for name in (("gate", "up") if shapes.model.gated else ("up",))]
    yield from _divided(f"{foreign}.linear_fc1", first, 0, rows)
    yield from _divided(f"{foreign}.linear_fc2", [shapes.parts(f"{own}.down")], 1)


def _mixture(foreign: str, own: str, shapes: Shapes) -> Iterator[Rule]:
    """Yield the rules of a layer's router, its experts by number, and what every token passes through."""
    moe = shapes.model.moe
    yield Rule(f"{foreign}.router.weight", (shapes.weight(f"{own}.router"),))
    selection = shapes.find(f"{own}.router.selection_bias")
    if selection is not None:
        yield Rule(f"{foreign}.router.expert_bias", (selection,))
    for expert in range(moe.num_experts):
        yield from _mlp(f"{foreign}.experts.{expert}", f"{own}.experts.{expert}", shapes)
    if moe.shared_ffn_hidden_size:
        yield from _mlp(f"{foreign}.shared_experts", f"{own}.shared_expert", shapes)
    if moe.shared_gate:
        yield Rule(f"{foreign}.shared_experts.gate_weight", (shapes.weight(f"{own}.shared_gate"),))


def _norm(foreign: str, parts: dict[str, Part]) -> Iterator[Rule]:
    for kind, part in parts.items():
        yield Rule(f"{foreign}.{kind}", (part,))


def _divided(
    foreign: str, parts: list[dict[str, Part]], dim: int, rows: Callable[[], Tensor] | None = None
) -> Iterator[Rule]:
    """Yield the rules of a linear layer, divided on its output (dim 0: weight and bias) or its input (dim 1: the weight only)."""
    for kind in parts[0]:
        yield Rule(
            f"{foreign}.{kind}",
            tuple(part[kind] for part in parts),
            rows,
            dim=dim if kind == "weight" or dim == 0 else None,
        )


def _qkv_rows(shapes: Shapes, tensor: int, version: float) -> Tensor:
    """Order the rows of the fused projection, all ranks' parts one after the other."""
    if version >= 2:
        return order_grouped_rows(shapes.heads, shapes.kv_heads, shapes.head_dim)
    if shapes.heads != shapes.kv_heads:
        raise ConfigError(f"checkpoint_version {version} has no grouped-query attention")
    rows = torch.arange(3 * shapes.heads * shapes.head_dim).view(3, tensor, shapes.heads // tensor, shapes.head_dim)
    # 0: [3, heads, d] on each rank; 1: [heads, d, 3] on each rank
    return rows.permute(1, 0, 2, 3).reshape(-1) if version == 0 else rows.permute(1, 2, 3, 0).reshape(-1)
