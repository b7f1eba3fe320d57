"""A dense model made into a mixture that computes the same: every expert begins as a copy of the MLP.

The weights of a token's experts sum to 1, so whichever it is sent to, the sum is what the MLP gave. The routers begin with random
weights, by which the copies come to see different tokens, and grow apart in training.
Source: Komatsuzaki et al. 2022 (sparse upcycling, arXiv:2212.05055)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megalm.architecture.tensors import list_states, list_tensors
from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.config.mixture import check_mixture
from megalm.config.model import MoEConfig
from megalm.convert.source import Source
from megalm.convert.weights import WeightReader
from megalm.parallel.initialize import draw_values
from megalm.parallel.slices import Piece

EXPERTS = ".mlp.experts."
SEED = 1234
"""Of the routers' first weights."""


def upcycle(source: Source, num_experts: int, top_k: int) -> Source:
    """The source with `num_experts` copies of each layer's MLP. Errors: ConfigError where it is a mixture already."""
    dense = source.model
    if dense.moe.num_experts:
        raise ConfigError(
            f"{source.path}: has {dense.moe.num_experts} experts in its layers already; upcycling is for dense models"
        )
    if num_experts < 2:
        raise ConfigError(f"upcycle={num_experts}: a mixture needs at least 2 experts")
    model = replace(dense, name=f"{dense.name}-{num_experts}x", moe=MoEConfig(num_experts=num_experts, top_k=top_k))
    model.fill_in()
    check_mixture(model)
    note = f"upcycled: each layer's MLP {num_experts} times, {top_k} of them for a token; the routers are new"
    weights = UpcycledWeights(source.weights, model)
    return replace(source, model=model, weights=weights, config_json=None, optimizer=None, notes=[*source.notes, note])


class UpcycledWeights:
    """The weights of the mixture, read from those of the dense model."""

    def __init__(self, dense: WeightReader, model: ModelConfig) -> None:
        self._dense, self._std = dense, model.init_std
        self._shapes = {**dict(list_tensors(model)), **dict(list_states(model))}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if ".router." in name else self._dense.dtype(_find_dense(name))

    def read(self, name: str) -> Tensor:
        if ".router." not in name:
            return self._dense.read(_find_dense(name))
        shape = self._shapes[name]
        if not name.endswith(".weight"):
            return torch.zeros(shape)
        piece = Piece(name, shape, (0,) * len(shape), shape)
        return torch.from_numpy(np.concatenate([part for _, part in draw_values(SEED, piece, self._std)])).view(shape)


def _find_dense(name: str) -> str:
    """Find the dense model's tensor that a tensor of the mixture is a copy of."""
    layer, inside, rest = name.partition(EXPERTS)
    return f"{layer}.mlp.{rest.partition('.')[2]}" if inside else name
