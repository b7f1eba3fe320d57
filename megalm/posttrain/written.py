"""What one rollout wrote and how it was judged, alike on every rank; as numbers, and as plain JSON."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

N_GRAM = 4
"""Tokens in a row whose repetition is measured."""


@dataclass
class Written:
    """Completions in the order of their groups, [groups * G].

    Shapes: tokens int32 and drawn fp32 [N, longest], padded; lengths, ended, entropies, failed [N]; rewards fp64 [N, rewards]
    """

    groups: np.ndarray
    """Numbers of the groups in the stream, int64 [groups]."""
    tokens: np.ndarray
    drawn: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    entropies: np.ndarray
    """Mean over each completion's tokens of the entropy of the distribution that they were drawn from."""
    failed: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    """fp64 [N]"""

    def completion(self, number: int) -> np.ndarray:
        """Ids of one."""
        return self.tokens[number, : self.lengths[number]]

    def repetition(self) -> float:
        """Share of n-grams that stood in their completion before, mean over completions."""
        shares = []
        for number in range(len(self.lengths)):
            grams = np.lib.stride_tricks.sliding_window_view(self.completion(number), N_GRAM) if self.lengths[
                number
            ] >= N_GRAM else ()  # fmt: skip
            shares.append(1 - len({gram.tobytes() for gram in grams}) / len(grams) if len(grams) else 0.0)
        return float(np.mean(shares))

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON: what a checkpoint in the middle of a rollout holds."""
        return {
            name: [str(array.dtype), list(array.shape), base64.b85encode(zlib.compress(array.tobytes())).decode()]
            for name, array in vars(self).items()
        }

    @staticmethod
    def from_dict(state: dict[str, Sequence[Any]]) -> Written:
        """What `as_dict` gave."""
        arrays = {}
        for name, (dtype, shape, packed) in state.items():
            arrays[name] = np.frombuffer(zlib.decompress(base64.b85decode(packed)), dtype).reshape(shape).copy()
        return Written(**arrays)
