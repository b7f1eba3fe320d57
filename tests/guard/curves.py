"""Synthetic loss curves with the statistics of real ones: a power law, noise of 3% with heavy tails, data outliers."""

import numpy as np


def healthy(length: int, seed: int = 0, *, noise: float = 0.029, outliers: float = 0.003) -> np.ndarray:
    random = np.random.default_rng(seed)
    steps = np.arange(length)
    level = 2.6 + 8.0 * (1.0 + steps / 12.0) ** -0.55
    wobble = noise * random.standard_t(8, length)
    jumps = np.where(random.random(length) < outliers, random.exponential(0.25, length), 0.0)
    return level * np.exp(wobble + jumps)
