"""Documents of tokens in memory, as one source: for a plugin that makes or reads them itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.tokens import TokenFile


class HeldTokens(TokenFile):
    """Arrays of token ids as a data set. name: what messages and metrics call it.

    Errors: ConfigError where there is no token, or a document without one.
    """

    def __init__(self, name: str, documents: Sequence[np.ndarray]) -> None:
        self.lengths = np.array([len(document) for document in documents], np.int32)
        if not len(self.lengths) or not self.lengths.all():
            raise ConfigError(f"{name}: holds no token, or a document without one. Leave empty documents out.")
        self.prefix = self.index_path = self.tokens_path = name
        self.tokens = np.concatenate(documents)
        if not np.issubdtype(self.tokens.dtype, np.integer):
            raise ConfigError(f"{name}: holds {self.tokens.dtype}; ids of tokens are whole numbers.")
        self.dtype = self.tokens.dtype
        self.num_sequences = self.num_documents = len(self.lengths)
        self.num_tokens = len(self.tokens)
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        self.pointers = np.concatenate(([0], ends[:-1]))
        self.documents = np.arange(self.num_documents + 1)

    def prefetch(self, start: int, stop: int) -> None:
        """Nothing needs to be fetched."""
