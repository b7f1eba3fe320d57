"""A hash of integers (splitmix64, Steele et al. 2014)."""

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function: neighbouring inputs get unrelated outputs. Shapes: uint64 -> uint64"""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
