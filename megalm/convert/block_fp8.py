"""Weights that are stored in fp8 with a scale for each block, as DeepSeek-V3's are, read as 16-bit numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.convert.weights import WeightReader

SCALE = "_scale_inv"
"""Behind a weight's name: the tensor of what its blocks are multiplied by."""


class BlockFp8Reader:
    """The tensors of another reader, those with scales multiplied by them: w = fp8 x scale of its block, rounded to `dtype`.

    Shapes: weight fp8 [F, H], scales fp32 [ceil(F / b), ceil(H / b)] -> [F, H]
    """

    def __init__(self, stored: WeightReader, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16):
        self._stored, self._block, self._dtype = stored, block, dtype
        there = set(stored.names())
        self._scaled = {name.removesuffix(SCALE) for name in there if name.endswith(SCALE)}
        lost = sorted(self._scaled - there)
        if lost:
            raise ConfigError(f"{lost[0]}{SCALE} has no weight beside it: copy the whole checkpoint")
        bare = sorted(name for name in there - self._scaled if stored.dtype(name) in _FP8)
        if bare:
            raise ConfigError(f"{bare[0]} is stored in fp8 and has no {SCALE[1:]} beside it: copy the whole checkpoint")

    def names(self) -> list[str]:
        return [name for name in self._stored.names() if not name.endswith(SCALE)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._scaled else self._stored.dtype(name)

    def read(self, name: str) -> Tensor:
        weight = self._stored.read(name)
        if name not in self._scaled:
            return weight
        scales = self._stored.read(name + SCALE).float()
        wanted = tuple(-(-size // block) for size, block in zip(weight.shape, self._block, strict=True))
        if tuple(scales.shape) != wanted:
            raise ConfigError(f"{name}{SCALE} is {list(scales.shape)}, not {list(wanted)}: is the block {self._block}?")
        for dim, block in enumerate(self._block):
            scales = scales.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
        return (weight.float() * scales).to(self._dtype)


_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_fp8_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Read the block of a `quantization_config` that is read here; None: another quantization, or none."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return None
    block = settings.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2:
        return None
    return int(block[0]), int(block[1])
