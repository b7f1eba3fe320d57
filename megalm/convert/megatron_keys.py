"""Where a torch_dist checkpoint of Megatron-LM keeps a layer's tensors: the keys, and the place within a stored tensor.

Layers that are all alike are stacked on a first axis, `decoder.layers.mlp.linear_fc2.weight` [layers, ...]; where some
are dense and others mixtures of experts, each has its number in the key. The experts of a layer are stacked behind that,
`decoder.layers.mlp.experts.experts.linear_fc2.weight` [layers, experts, ...]; the plain name numbers them too,
`decoder.layers.3.mlp.experts.7.linear_fc2.weight`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalm.config import ModelConfig
from megalm.convert.megatron_names import spell, spell_plainly

STACK = "decoder.layers."
_NUMBERED = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERTS = "mlp.experts.experts."
_EXPERT = re.compile(r"^mlp\.experts\.(\d+)\.(.+)$")
_ATTENTION_WITH_STATE = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
_LINEAR_OF_MLP = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Place:
    """One tensor's place in a stored one: `index` within the first axes, whose sizes are `sizes`; both empty where it is all
    of it."""

    key: str
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def are_alike(model: ModelConfig) -> bool:
    """Tell whether Megatron stacks the layers: all of them dense, or all of them mixtures."""
    return len({model.moe.is_dense(layer) for layer in range(model.num_layers)}) == 1


def find_place(model: ModelConfig, name: str) -> Place:
    """Find where the tensor of this plain name is stored."""
    match = _NUMBERED.match(name)
    if match is None:
        return Place(spell(name, "te"))
    layer, rest = int(match[1]), match[2]
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    if are_alike(model):
        index, sizes, prefix = (layer,), (model.num_layers,), STACK
    else:
        prefix = f"{STACK}{layer}."
    expert = _EXPERT.match(rest)
    if expert is not None:
        index, sizes = (*index, int(expert[1])), (*sizes, model.moe.num_experts)
        rest = f"{_EXPERTS}{expert[2]}"
    if not rest.startswith("pre_mlp_layernorm.") or model.moe.is_dense(layer):
        # A mixture has no single linear layer that its norm could lie in.
        rest = spell(f".{rest}", "te")[1:]
    return Place(prefix + rest, index, sizes)


def list_places(model: ModelConfig, name: str) -> list[Place]:
    """List the places to write the tensor of this plain name to.

    They are two for the norm in front of a mixture: Megatron's specs of layers name it by itself with Transformer Engine, and
    as if it lay in a linear layer without.
    """
    place = find_place(model, name)
    again = spell(name, "te")
    match = _NUMBERED.match(again)
    if match is None or ".pre_mlp_layernorm." not in name or model.moe.is_dense(int(match[1])):
        return [place]
    prefix = STACK if place.index else f"{STACK}{match[1]}."
    return [place, Place(prefix + match[2], place.index, place.sizes)]


def list_plain_names(name: str, size: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the plain names of a stored tensor's parts, each with its index in the first axes.

    `name` is the key without what stands in front of `decoder`, `size` the stored tensor's.
    """
    if not name.startswith(STACK):
        yield spell_plainly(name), ()
        return
    match = _NUMBERED.match(name)
    rest = match[2] if match else name.removeprefix(STACK)
    axes = 0 if match else 1
    layers = [int(match[1])] if match else list(range(size[0]))
    if not rest.startswith(_EXPERTS):
        for layer in layers:
            yield spell_plainly(f"{STACK}{layer}.{rest}"), () if match else (layer,)
        return
    rest = rest.removeprefix(_EXPERTS)
    for layer, expert in itertools.product(layers, range(size[axes])):
        yield f"{STACK}{layer}.mlp.experts.{expert}.{rest}", (expert,) if match else (layer, expert)


def list_extra_states(model: ModelConfig) -> list[str]:
    """List the objects that Megatron's modules ask for by name when they are loaded: states of their own beside the weights,
    which are empty without fp8, of Megatron's linear layers and Transformer Engine's."""
    names = []
    for layer in range(model.num_layers):
        modules = [f"self_attention.{module}" for module in _ATTENTION_WITH_STATE]
        if model.moe.is_dense(layer):
            modules += [f"mlp.{module}" for module in _LINEAR_OF_MLP]
        else:
            modules += ["pre_mlp_layernorm"]
            modules += [f"mlp.experts.{e}.{module}" for e in range(model.moe.num_experts) for module in _LINEAR_OF_MLP]
            modules += [f"mlp.shared_experts.{module}" for module in _LINEAR_OF_MLP if model.moe.shared_ffn_hidden_size]
        for module in modules:
            place = find_place(model, f"{STACK}{layer}.{module}._extra_state")
            index, sizes = place.index or (0,), place.sizes or (1,)
            names.append(f"{place.key}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}")
    return [*names, "decoder.final_layernorm._extra_state/shard_0_1"]
