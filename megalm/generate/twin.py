"""A chunk of a model in training that writes: other modules around the very same weights.

A layout that is good for training is not one for writing: one token cannot be cut over ranks by its position. So a chunk gets a
twin without sequence and context parallelism. Its parameters and buffers are the chunk's own tensors, not copies.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megalm.config import Config
from megalm.model.transformer import Transformer
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Axis, Mesh
from megalm.precision.policy import make_policy


def make_twin(chunk: Transformer, config: Config, mesh: Mesh) -> Transformer:
    """Make the chunk's layers with its weights, in evaluation mode, for whole texts on each context rank."""
    alone = replace(mesh, context=Axis("context", ranks=(mesh.rank,)))
    parallel = replace(config.parallel, sequence=False, recompute="none", context=1)
    choice = AttentionChoice(config.ops.attention, config.train.determinism)
    context = LayerContext(alone, parallel, make_policy(config.precision, config.model), torch.device("meta"), choice)
    twin = Transformer(config.model, context, layers=chunk.numbers, first=chunk.first, last=chunk.last)
    for (name, own), (other_name, other) in zip(twin.named_modules(), chunk.named_modules(), strict=True):
        assert name == other_name
        for key in own._parameters:
            own.register_parameter(key, other._parameters[key])
        for key in own._buffers:
            own._buffers[key] = other._buffers[key]
    return twin.eval()
