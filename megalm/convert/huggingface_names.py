"""The tensors of Hugging Face models, as rules over megalm's global names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megalm.architecture.layers import name_layer
from megalm.architecture.shape import shape_of
from megalm.architecture.tensors import list_tensors
from megalm.config import ModelConfig
from megalm.convert.rules import Part, Rule, grouped_rows, half_split_rows

# Buffers that old versions of transformers stored and that follow from the configuration.
RECOMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$"
)


class Shapes:
    """The global tensors of a model by the layer that they belong to, and the sizes that their rows are ordered by."""

    def __init__(self, model: ModelConfig):
        shape = shape_of(model)
        self.model = model
        self.ffn, self.head_dim = shape.ffn_hidden_size, shape.head_dim
        self.heads, self.kv_heads = shape.num_heads, shape.num_kv_heads
        self._tensors = dict(list_tensors(model))

    def parts(self, name: str) -> dict[str, Part]:
        """List weight, and bias where there is one, of the linear layer, norm or embedding called `name`."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        found = {"weight": Part(weight, self._tensors[weight])}
        if bias in self._tensors:
            found["bias"] = Part(bias, self._tensors[bias])
        return found

    def weight(self, name: str) -> Part:
        """The weight of what has no bias."""
        return self.parts(name)["weight"]

    def attention(self, layer: int, name: str) -> dict[str, Part]:
        return self.parts(f"{name_layer(layer)}.attention.{name}")

    def query_key_value(self, layer: int) -> list[dict[str, Part]]:
        return [self.attention(layer, name) for name in ("query", "key", "value")]

    def mlp(self, layer: int, name: str) -> dict[str, Part]:
        return self.parts(f"{name_layer(layer)}.mlp.{name}")

    def norm(self, layer: int, name: str) -> dict[str, Part]:
        return self.parts(f"{name_layer(layer)}.{name}_norm")

    def qk_norms(self, layer: int) -> dict[str, Part]:
        """The norms of queries and keys by what they norm; none where the model has none."""
        names = ("query", "key") if self.model.qk_norm else ()
        return {name: self.attention(layer, f"{name}_norm")["weight"] for name in names}

    def half_split(self, heads: int) -> Callable[[], Tensor] | None:
        """Order the rows of a projection of `heads` heads where the model's rotary pairs are interleaved; else None."""
        if self.model.position != "rope" or not self.model.rope_interleaved:
            return None
        return partial(half_split_rows, heads, self.head_dim, int(self.head_dim * self.model.rope_fraction))


def _same(foreign: str, parts: dict[str, Part], *, transpose: bool = False) -> Iterator[Rule]:
    """Yield the rules of a layer that differs in name only; `transpose` applies to its weight."""
    for kind, part in parts.items():
        yield Rule(f"{foreign}.{kind}", (part,), transpose=transpose and kind == "weight")


def _fused(
    foreign: str, parts: list[dict[str, Part]], *, rows: Callable[[], Tensor] | None = None, transpose: bool = False
) -> Iterator[Rule]:
    """Yield the rules of several layers stacked into one."""
    for kind in parts[0]:
        yield Rule(f"{foreign}.{kind}", tuple(part[kind] for part in parts), rows, transpose and kind == "weight")


def _llama_rules(model: ModelConfig) -> Iterator[Rule]:
    """Llama, Mistral, Qwen2, Qwen3 and OLMo 2, which share their names but for the norms."""
    shapes = Shapes(model)
    norms = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    if model.norm_placement == "post":
        norms = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    yield Rule("model.embed_tokens.weight", (shapes.weight("embedding"),))
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for ours, theirs in norms.items():
            yield from _same(f"{prefix}.{theirs}", shapes.norm(layer, ours))
        heads = (shapes.heads, shapes.kv_heads, None)
        for letter, count, parts in zip("qkv", heads, shapes.query_key_value(layer), strict=True):
            yield from _fused(
                f"{prefix}.self_attn.{letter}_proj", [parts], rows=shapes.half_split(count) if count else None
            )
        full = model.qk_norm_scope == "full"
        for name, part in shapes.qk_norms(layer).items():
            count = {"query": shapes.heads, "key": shapes.kv_heads}[name] if full else 1
            yield Rule(f"{prefix}.self_attn.{name[0]}_norm.weight", (part,), shapes.half_split(count))
        yield from _same(f"{prefix}.self_attn.o_proj", shapes.attention(layer, "output"))
        for name in ("gate", "up", "down"):
            yield from _same(f"{prefix}.mlp.{name}_proj", shapes.mlp(layer, name))
    yield from _same("model.norm", shapes.parts("final_norm"))
    if not model.tie_embeddings:
        yield Rule("lm_head.weight", (shapes.weight("output"),))


def _gpt2_rules(model: ModelConfig) -> Iterator[Rule]:
    """GPT-2: matrices are stored transposed, query, key and value stacked."""
    shapes = Shapes(model)
    yield Rule("transformer.wte.weight", (shapes.weight("embedding"),))
    yield Rule("transformer.wpe.weight", (shapes.weight("position_embedding"),))
    for layer in range(model.num_layers):
        prefix = f"transformer.h.{layer}"
        yield from _same(f"{prefix}.ln_1", shapes.norm(layer, "attention"))
        yield from _fused(f"{prefix}.attn.c_attn", shapes.query_key_value(layer), transpose=True)
        yield from _same(f"{prefix}.attn.c_proj", shapes.attention(layer, "output"), transpose=True)
        yield from _same(f"{prefix}.ln_2", shapes.norm(layer, "mlp"))
        yield from _same(f"{prefix}.mlp.c_fc", shapes.mlp(layer, "up"), transpose=True)
        yield from _same(f"{prefix}.mlp.c_proj", shapes.mlp(layer, "down"), transpose=True)
    yield from _same("transformer.ln_f", shapes.parts("final_norm"))
    if not model.tie_embeddings:
        yield Rule("lm_head.weight", (shapes.weight("output"),))


def _gpt_neox_rules(model: ModelConfig) -> Iterator[Rule]:
    """GPT-NeoX and Pythia: [query, key, value] of each head together."""
    shapes = Shapes(model)
    yield Rule("gpt_neox.embed_in.weight", (shapes.weight("embedding"),))
    for layer in range(model.num_layers):
        prefix = f"gpt_neox.layers.{layer}"
        yield from _same(f"{prefix}.input_layernorm", shapes.norm(layer, "attention"))
        yield from _same(f"{prefix}.post_attention_layernorm", shapes.norm(layer, "mlp"))
        order = partial(_neox_rows, shapes)
        yield from _fused(f"{prefix}.attention.query_key_value", shapes.query_key_value(layer), rows=order)
        yield from _same(f"{prefix}.attention.dense", shapes.attention(layer, "output"))
        yield from _same(f"{prefix}.mlp.dense_h_to_4h", shapes.mlp(layer, "up"))
        yield from _same(f"{prefix}.mlp.dense_4h_to_h", shapes.mlp(layer, "down"))
    yield from _same("gpt_neox.final_layer_norm", shapes.parts("final_norm"))
    if not model.tie_embeddings:
        yield Rule("embed_out.weight", (shapes.weight("output"),), aliases=("lm_head.weight",))


def _neox_rows(shapes: Shapes) -> Tensor:
    rows = grouped_rows(shapes.heads, shapes.kv_heads, shapes.head_dim)
    order = shapes.half_split(shapes.heads + shapes.kv_heads)  # queries and keys turn, values stay
    if order is None:
        return rows
    turned = order()
    return torch.cat([turned, torch.arange(len(turned), len(rows))])[rows]


def _mpt_rules(model: ModelConfig) -> Iterator[Rule]:
    """MPT: query, key and value stacked; no bias anywhere."""
    shapes = Shapes(model)
    yield Rule("transformer.wte.weight", (shapes.weight("embedding"),))
    for layer in range(model.num_layers):
        prefix = f"transformer.blocks.{layer}"
        yield from _same(f"{prefix}.norm_1", shapes.norm(layer, "attention"))
        yield from _fused(f"{prefix}.attn.Wqkv", shapes.query_key_value(layer))
        yield from _same(f"{prefix}.attn.out_proj", shapes.attention(layer, "output"))
        yield from _same(f"{prefix}.norm_2", shapes.norm(layer, "mlp"))
        yield from _same(f"{prefix}.ffn.up_proj", shapes.mlp(layer, "up"))
        yield from _same(f"{prefix}.ffn.down_proj", shapes.mlp(layer, "down"))
    yield from _same("transformer.norm_f", shapes.parts("final_norm"))
    if not model.tie_embeddings:
        yield Rule("lm_head.weight", (shapes.weight("output"),))


TABLES: dict[str, Callable[[ModelConfig], Iterator[Rule]]] = {
    "llama": _llama_rules,
    "mistral": _llama_rules,
    "qwen2": _llama_rules,
    "qwen3": _llama_rules,
    "olmo2": _llama_rules,
    "gpt2": _gpt2_rules,
    "gpt_neox": _gpt_neox_rules,
    "mpt": _mpt_rules,
}

# Tensors that may be stored beside a tied embedding although they are the same matrix.
TIED_COPIES = ("lm_head.weight", "embed_out.weight")


def rules(model: ModelConfig, model_type: str) -> list[Rule]:
    """Make the table of an architecture, layer after layer."""
    return list(TABLES[model_type](model))
