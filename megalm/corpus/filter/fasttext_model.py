"""Classifiers in fastText's format (.bin, .ftz), by the library that only predicts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.filter.batch import Batch

PREFIX = "__label__"


@dataclass(frozen=True)
class FastText:
    """The probability of one label, as a model in fastText's format gives it for the text on one line."""

    path: str
    label: str
    score: str
    needs_fields = False

    @property
    def gives(self) -> tuple[str, ...]:
        """The probability."""
        return (self.score,)

    def apply(self, batch: Batch) -> None:
        """Gives the probability."""
        model, label = load_fasttext(self.path), name_label(self.label)
        found = np.zeros(len(batch.texts))
        for number, text in enumerate(batch.texts):
            labels, probabilities = model.predict(" ".join(text.split()), k=-1)
            found[number] = dict(zip(labels, probabilities, strict=True)).get(label, 0.0)
        batch.give(self.score, np.clip(found, 0.0, 1.0))

    def check(self) -> None:
        """Errors: ConfigError if the model cannot be loaded or never gives the label."""
        labels = load_fasttext(self.path).predict("a", k=-1)[0]
        if name_label(self.label) not in labels:
            shown = ", ".join(sorted(labels)[:8]) + (", ..." if len(labels) > 8 else "")
            raise ConfigError(f"{self.path} has no label {self.label!r}: choose from {shown}")


def name_label(label: str) -> str:
    """Name the label with fastText's prefix."""
    return label if label.startswith(PREFIX) else PREFIX + label


@lru_cache(maxsize=4)
def load_fasttext(path: str) -> Any:
    """Load the model.

    Errors: ConfigError where the library is not installed, or the file is no such model.
    """
    try:
        import fasttext
    except ImportError as error:
        raise ConfigError("a rule on a model of fastText needs `pip install fasttext-predict`.") from error
    try:
        return fasttext.load_model(path)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise ConfigError(f"{path} is no model in fastText's format ({error}): name a .bin or .ftz.") from error
