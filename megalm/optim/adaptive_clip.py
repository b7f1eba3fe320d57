"""Gradient clipping that learns what is usual: ZClip for the whole gradient, AdaGC for each tensor by itself.

Pure: norms in, factors out. Every rank is given the same norms, which are reduced over the world, and so keeps the same
state. `factor` is called once for each update that is made; refused ones leave no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megalm.config.optim import AdaptiveClipConfig, OptimConfig


class Clip(Protocol):
    """What bounds the gradient."""

    def factor(self, norm: float) -> float:
        """What all gradients are multiplied by, when their global L2 norm is `norm`."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; {} when there was none."""
        ...


class FixedClip:
    """Down to a fixed global norm; 0: never (Pascanu et al. 2013, arXiv:1211.5063)."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def factor(self, norm: float) -> float:
        # The small constant keeps a zero norm finite, as in torch.nn.utils.clip_grad_norm_.
        return min(1.0, self.limit / (norm + 1e-6)) if self.limit else 1.0

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class ZClip:
    """Norms more than `threshold` deviations above their moving average are brought to mean + threshold^2 / z deviations.

    The averages are of clipped norms, and begin with the plain ones of the first `count_warmup_steps` norms. The fixed limit
    applies as well.
    Source: Kumar et al. 2025 (ZClip, arXiv:2504.02507)
    """

    def __init__(self, config: AdaptiveClipConfig, limit: float) -> None:
        self.threshold, self.decay, self.warmup = config.threshold, config.decay, config.warmup_steps
        self.fixed = FixedClip(limit)
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def factor(self, norm: float) -> float:
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / len(self.first)
            return self.fixed.factor(norm)
        deviation = math.sqrt(self.variance) + 1e-6
        z = (norm - self.mean) / deviation
        kept = self.mean + self.threshold**2 / z * deviation if z > self.threshold else norm
        self.mean = self.decay * self.mean + (1 - self.decay) * kept
        self.variance = self.decay * self.variance + (1 - self.decay) * (kept - self.mean) ** 2
        return kept / norm * self.fixed.factor(kept) if norm > 0 else 1.0

    def state(self) -> dict[str, Any]:
        return {"first": list(self.first), "mean": self.mean, "variance": self.variance}

    def load_state(self, state: dict[str, Any]) -> None:
        self.first = list(state.get("first", []))
        self.mean, self.variance = state.get("mean", 0.0), state.get("variance", 0.0)


class AdaGC:
    """Each tensor's gradient down to `threshold` times the moving average of its own clipped norms.

    In the first `count_warmup_steps` updates the whole gradient is clipped to the fixed limit, and a tensor's reference is the
    smallest norm that it had.
    Source: Wang et al. 2025 (AdaGC, arXiv:2502.11034), algorithm 1
    """

    def __init__(self, config: AdaptiveClipConfig, limit: float, names: Sequence[str]) -> None:
        self.threshold, self.decay, self.warmup = config.threshold, config.decay, config.warmup_steps
        self.fixed = FixedClip(limit)
        self.names = list(names)
        self.usual = np.full(len(self.names), np.inf)
        self.updates = 0

    def factor(self, norm: float) -> float:
        return self.fixed.factor(norm) if self.updates < self.warmup else 1.0

    def tensor_factors(self, norms: np.ndarray) -> np.ndarray:
        """What each tensor's gradient is multiplied by. Shapes: norms (after `factor`) [tensors] -> [tensors]"""
        self.updates += 1
        if self.updates <= self.warmup:
            self.usual = np.minimum(self.usual, norms)
            return np.ones_like(norms)
        factors = np.minimum(1.0, self.threshold * self.usual / np.maximum(norms, 1e-30))
        known = np.isfinite(self.usual)  # a tensor without a past starts with its norm
        usual = np.where(known, self.usual, norms)
        self.usual = self.decay * usual + (1 - self.decay) * norms * factors
        return factors

    def state(self) -> dict[str, Any]:
        finite = {name: float(x) for name, x in zip(self.names, self.usual, strict=True) if np.isfinite(x)}
        return {"usual": finite, "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        usual = state.get("usual", {})
        self.usual = np.array([usual.get(name, np.inf) for name in self.names])
        self.updates = int(state.get("updates", 0))


def make_clip(optim: OptimConfig, names: Sequence[str]) -> Clip:
    """Make the clipping that `optim.clip_grad_norm` and `optim.adaptive_clip` ask for."""
    config = optim.adaptive_clip
    if config.kind == "zclip":
        return ZClip(config, optim.clip_grad_norm)
    if config.kind == "adagc":
        return AdaGC(config, optim.clip_grad_norm, names)
    return FixedClip(optim.clip_grad_norm)
