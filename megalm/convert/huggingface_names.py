"""The tensors of Hugging Face models, as rules over megalm's global names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megalm.architecture.layers import name_layer
from megalm.architecture.shape import resolve_shape
from megalm.architecture.tensors import list_states, list_tensors
from megalm.config import ModelConfig
from megalm.convert.families import FAMILIES
from megalm.convert.families.family import Experts, Family, Names
from megalm.convert.rules import Part, Rule, order_grouped_rows, order_half_split_rows

# Buffers that old versions of transformers stored and that follow from the configuration.
RECOMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$"
)


class Shapes:
    """The global tensors of a model by the layer that they belong to, and the sizes that their rows are ordered by."""

    def __init__(self, model: ModelConfig):
        shape = resolve_shape(model)
        self.model = model
        self.ffn, self.head_dim = shape.ffn_hidden_size, shape.head_dim
        self.heads, self.kv_heads = shape.num_heads, shape.num_kv_heads
        self.experts = model.moe.num_experts
        self._tensors = {**dict(list_tensors(model)), **dict(list_states(model))}

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

    def find(self, name: str) -> Part | None:
        """Find the tensor of this name, where the model has it."""
        return Part(name, self._tensors[name]) if name in self._tensors else None

    def view(self, name: str) -> tuple[int, ...] | None:
        """The shape in which transformers stores what is flat here: norms that each head has for itself."""
        each = self.model.qk_norm and self.model.qk_norm_scope == "each"
        if not each or not name.endswith(("query_norm.weight", "key_norm.weight")):
            return None
        return (self.heads if "query_norm" in name else self.kv_heads, self.head_dim)

    def turn(self, name: str, interleaved: bool) -> Callable[[], Tensor] | None:
        """Order the rows of queries, keys and their norms where this model's rotary pairs lie otherwise than `interleaved`."""
        if self.model.position != "rope" or self.model.rope_interleaved == interleaved:
            return None
        if self.model.latent.key_rank:
            return self._turn_latent(name, interleaved)
        part = next((p for p in ("query_norm", "key_norm", "query", "key") if f".attention.{p}." in name), None)
        if part is None:
            return None
        heads = self.heads if part.startswith("query") else self.kv_heads
        if part.endswith("norm") and self.model.qk_norm_scope == "head":
            heads = 1
        rotated = int(self.head_dim * self.model.rope_fraction)
        if interleaved:
            return lambda: torch.argsort(order_half_split_rows(heads, self.head_dim, rotated))
        return partial(order_half_split_rows, heads, self.head_dim, rotated)

    def _turn_latent(self, name: str, interleaved: bool) -> Callable[[], Tensor] | None:
        """The same of latent attention: each query head's last features, and the last rows of what makes the latent."""
        latent = self.model.latent
        heads, kept = {
            "query": (self.heads, latent.plain_dim),
            "query_up": (self.heads, latent.plain_dim),
            "key_value_down": (1, latent.key_rank),
        }.get(name.split(".")[-2], (0, 0))
        if not heads:
            return None

        def rows() -> Tensor:
            turned = order_half_split_rows(1, latent.rope_dim, latent.rope_dim)
            turned = torch.argsort(turned) if interleaved else turned
            one = torch.cat([torch.arange(kept), kept + turned])
            return (torch.arange(heads)[:, None] * len(one) + one).reshape(-1)

        return rows


def make_huggingface_rules(model: ModelConfig, model_type: str) -> list[Rule]:
    """Make the table of a family, layer after layer."""
    family, shapes = FAMILIES[model_type], Shapes(model)
    names = family.names
    table = [rule for theirs, ours in names.ends.items() for rule in _rules(shapes, names, theirs, (ours,), family)]
    for layer in range(model.num_layers + model.prediction.depth):
        more = names.prediction if layer >= model.num_layers else {}
        for theirs, ours in {**more, **names.layer}.items():
            foreign, own = f"{names.prefix.format(layer)}.{theirs}", name_layer(layer)
            if isinstance(ours, Experts):
                table += _rules_of_experts(shapes, foreign, own, ours)
                continue
            parts = tuple(f"{own}.{part}" for part in ((ours,) if isinstance(ours, str) else ours))
            for expert in range(shapes.experts if "{}" in theirs else 1):
                each = tuple(part.format(expert) for part in parts)
                table += _rules(shapes, names, foreign.format(expert), each, family)
    return table


def list_prediction_copies(model: ModelConfig, model_type: str) -> list[Rule]:
    """List the rules of the tables that layers which predict further tokens have once more."""
    family, shapes = FAMILIES[model_type], Shapes(model)
    names, found = family.names, []
    for layer in range(model.num_layers, model.num_layers + model.prediction.depth):
        for theirs, ours in names.copies.items():
            ours = "embedding" if model.tie_embeddings else ours
            found.append(Rule(f"{names.prefix.format(layer)}.{theirs}.weight", (shapes.weight(ours),)))
    return found


def _rules_of_experts(shapes: Shapes, foreign: str, layer: str, ours: Experts) -> Iterator[Rule]:
    """Yield the rule of a tensor that holds all experts of a layer, where it is a mixture."""
    wanted = [f"{layer}.{part.format(expert)}" for expert in range(shapes.experts) for part in ours.parts]
    parts = tuple(part for name in wanted if (part := shapes.find(name)) is not None)
    if not parts:
        return
    together, rows = len(ours.parts), parts[0].shape[0]

    def alternate() -> Tensor:
        return (
            torch.arange(shapes.experts * together * rows)
            .view(shapes.experts, together, rows)
            .transpose(1, 2)
            .reshape(-1)
        )

    yield Rule(
        foreign,
        parts,
        alternate if ours.interleaved else None,
        view=(shapes.experts, together * rows, *parts[0].shape[1:]),
        swap=ours.transposed,
        flat=ours.flat,
    )


def _rules(shapes: Shapes, names: Names, theirs: str, ours: tuple[str, ...], family: Family) -> Iterator[Rule]:
    """Yield the rules of weight and bias, as far as the model has them."""
    for kind in (".weight", ".bias", ""):
        parts = tuple(part for name in ours if (part := shapes.find(name + kind)) is not None)
        if not parts:
            continue
        foreign = theirs + kind
        yield Rule(
            foreign,
            parts,
            _order(shapes, parts, names.grouped and len(parts) == 3, family.interleaved),
            transpose=names.transposed and len(parts[0].shape) > 1 and not theirs.startswith(tuple(names.ends)),
            aliases=(names.aliases[foreign],) if foreign in names.aliases else (),
            view=shapes.view(parts[0].name),
        )


def _order(shapes: Shapes, parts: tuple[Part, ...], grouped: bool, interleaved: bool) -> Callable[[], Tensor] | None:
    """The order of a foreign tensor's rows; None: that of the parts."""
    turned = [shapes.turn(part.name, interleaved) for part in parts]
    if not grouped and not any(turned):
        return None

    def rows() -> Tensor:
        orders = [
            order() if order is not None else torch.arange(part.shape[0])
            for order, part in zip(turned, parts, strict=True)
        ]
        starts = [sum(part.shape[0] for part in parts[:index]) for index in range(len(parts))]
        stacked = torch.cat([order + start for order, start in zip(orders, starts, strict=True)])
        return stacked[order_grouped_rows(shapes.heads, shapes.kv_heads, shapes.head_dim)] if grouped else stacked

    return rows


# Tensors that may be stored beside a tied embedding although they are the same matrix.
TIED_COPIES = ("lm_head.weight", "embed_out.weight")
