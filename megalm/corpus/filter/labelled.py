"""Documents that a person has labelled on the page of `megalm look`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megalm.corpus.filter.batch import Batch
from megalm.corpus.look.labels import Labels, make_key


@dataclass(frozen=True)
class Labelled:
    """Gives 1 for a text whose last label is one of these, else 0. A text is known by its content, wherever it lies."""

    path: str
    names: tuple[str, ...]
    gives = ("labelled",)
    needs_fields = False

    @cached_property
    def keys(self) -> frozenset[str]:
        """Of the texts that have one of the labels. Errors: ConfigError for a file that is no list of labels"""
        return frozenset(key for key, one in Labels(self.path).latest.items() if one.label in self.names)

    def apply(self, batch: Batch) -> None:
        """Gives the flag."""
        batch.give("labelled", np.array([float(make_key(text) in self.keys) for text in batch.texts]))
