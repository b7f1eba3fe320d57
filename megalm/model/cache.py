"""Keys and values of the tokens seen so far, so that generating one more token costs one token's work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class KeyValueCache:
    """The keys and values of one attention layer, in the order of the tokens.

    window: no later token sees further back than this, itself counted; older ones are forgotten.
    Shapes:  k, v [S, B, K/t, d]; room for `capacity` tokens, or for the window, is taken at the first append
    """

    def __init__(self, capacity: int, window: int | None = None):
        self.capacity, self.window = capacity, window
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next tokens' keys and values; returns those of all tokens so far, or as far back as one of them sees."""
        if self.window is not None and self.window <= self.capacity:
            return self._append_to_window(k, v, self.window)
        if self.length == 0:
            self._keys, self._values = (t.new_empty(self.capacity, *t.shape[1:]) for t in (k, v))
        end = self.length + k.shape[0]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache made for {self.capacity}")
        self._keys[self.length : end] = k
        self._values[self.length : end] = v
        self.length = end
        return self._keys[:end], self._values[:end]

    def _append_to_window(self, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        if self.length:
            k, v = torch.cat([self._keys, k]), torch.cat([self._values, v])
        kept = min(window - 1, k.shape[0])
        self._keys, self._values = (t[t.shape[0] - kept :].clone() for t in (k, v))
        self.length = kept or 1  # what matters is that something was there
        return k, v

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order; a row may be named several times. Shapes: rows int64 [B']"""
        self._keys, self._values = self._keys.index_select(1, rows), self._values.index_select(1, rows)


def select_rows(model: nn.Module, rows: Tensor) -> None:
    """Within `keep_cache`: what was kept goes on for these rows of the batch alone. Shapes: rows int64 [B']"""
    for module in model.modules():
        cache = getattr(module, "cache", None)
        if cache is not None:
            cache.select(rows)


def forget(model: nn.Module) -> None:
    """Within `keep_cache`: begin anew with other texts."""
    for module in model.modules():
        cache: Any = getattr(module, "cache", None)
        if cache is not None:
            cache.length = 0


@contextmanager
def keep_cache(model: nn.Module, capacity: int) -> Iterator[None]:
    """Within, each attention layer of the model keeps keys and values, and a forward pass takes only the next tokens."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "cache")]
    for layer in layers:
        layer.cache = KeyValueCache(capacity, layer.spec.window)
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None
