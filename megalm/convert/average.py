"""Weights of several checkpoints averaged: of the last ones of a run, or of runs that began alike.

The mean of the last checkpoints of a constant learning rate does much of what decaying it would have done, for nothing (Izmailov
et al. 2018, arXiv:1803.05407; for language models Sanyal et al. 2023, arXiv:2306.03241); that of fine-tuned models joins them
(Wortsman et al. 2022, arXiv:2203.05482).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.convert.huggingface_config import collect_function
from megalm.convert.source import Source
from megalm.convert.weights import WeightReader


def average(sources: Sequence[Source]) -> Source:
    """The first source with the mean of all sources' weights, each counting the same.

    Errors: ConfigError for models that compute another function, or have other weights, than the first
    """
    first = sources[0]
    function = collect_function(first.model)
    shapes = {name: first.weights.shape(name) for name in first.weights.names()}
    for other in sources[1:]:
        theirs = collect_function(other.model)
        differing = [key for key in function if function[key] != theirs.get(key)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{other.path}: {key} is {theirs.get(key)!r}, and {function[key]!r} in {first.path}: weights of other models "
                "cannot be averaged."
            )
        found = {name: other.weights.shape(name) for name in other.weights.names()}
        if found != shapes:
            name = next(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
            raise ConfigError(
                f"{other.path}: {name} has the shape {found.get(name)}, and {shapes.get(name)} in {first.path}: weights of "
                "other models cannot be averaged."
            )
    places = ", ".join(f"{one.path}" + (f" (step {one.step})" if one.step else "") for one in sources)
    return replace(
        first,
        weights=MeanWeights([one.weights for one in sources]),
        optimizer=None,
        step=max(one.step for one in sources),
        notes=[*first.notes, f"the mean of {len(sources)} models: {places}"],
    )


class MeanWeights:
    """Means of tensors, summed in fp64; one of each reader is in memory at a time."""

    def __init__(self, readers: Sequence[WeightReader]) -> None:
        self._readers = readers

    def names(self) -> list[str]:
        return self._readers[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._readers[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._readers[0].dtype(name)

    def read(self, name: str) -> Tensor:
        total = self._readers[0].read(name).double()
        for reader in self._readers[1:]:
            total += reader.read(name).double()
        return (total / len(self._readers)).to(self.dtype(name))
