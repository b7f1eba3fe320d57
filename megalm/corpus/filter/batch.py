"""Some documents on their way through the rules: their texts, fields, scores, and which rule dropped them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.scores import SCORES, Counted, CountSettings, count_texts

STAYS = -1


class Batch:
    """Texts with what rules found of them.

    Shapes: dropped_by int16 [texts], the number of the rule, or STAYS; value float64 [texts], what that rule saw
    """

    def __init__(self, texts: Texts, fields: Sequence[dict[str, Any]], settings: CountSettings):
        self.texts, self.fields, self.settings = texts, fields, settings
        self.dropped_by = np.full(len(texts), STAYS, np.int16)
        self.value = np.zeros(len(texts))
        self.columns: dict[str, np.ndarray] = {}
        """The scores that rules asked for, by the name of the column; float64 [texts]."""
        self.labels: dict[str, list[str]] = {}
        """Words that steps found for every text, such as its language."""
        self.changed = np.zeros(len(texts), bool)
        """Whether an edit changed the text."""
        self._given: dict[str, np.ndarray] = {}
        self._counted: Counted | None = None

    def score(self, name: str) -> np.ndarray:
        """A score of the texts as they are now: one of SCORES, or what a step gave."""
        if name in self._given:
            return self._given[name]
        if self._counted is None:
            self._counted = count_texts(self.texts, self.settings)
        return SCORES[name].of(self._counted)

    def give(self, name: str, values: np.ndarray) -> None:
        """A score that a step has found."""
        self._given[name] = np.asarray(values, np.float64)

    def change(self, texts: Texts) -> None:
        """The texts become others; scores are counted again."""
        before, after = self.texts.contents(), texts.contents()
        self.changed |= np.array([bytes(one) != bytes(other) for one, other in zip(before, after, strict=True)], bool)
        self.texts, self._counted = texts, None

    def drop(self, rule: int, wanted: np.ndarray, values: np.ndarray) -> None:
        """Documents that no rule has dropped before are dropped by this one."""
        new = wanted & (self.dropped_by == STAYS)
        self.dropped_by[new] = rule
        self.value[new] = values[new]


class Step(Protocol):
    """What is done with a batch: an edit of the texts, or a score."""

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the scores that rules may ask for behind it."""

    @property
    def needs_fields(self) -> bool:
        """Whether it looks at more of a document than its text."""

    def apply(self, batch: Batch) -> None:
        """Changes texts, or gives scores."""


@dataclass(frozen=True)
class Bound:
    """Keeps the documents with a score in a range."""

    name: str
    score: str
    column: str
    at_least: float = -np.inf
    at_most: float = np.inf

    def apply(self, batch: Batch, number: int) -> None:
        """Drops the others. A score that is not there drops nothing where it is NaN, and always where it is infinite."""
        values = batch.score(self.score)
        batch.columns[self.column] = values
        batch.drop(number, self.refuses(values), values)

    def refuses(self, values: np.ndarray) -> np.ndarray:
        """Of each value, whether a document with it is dropped."""
        return (values < self.at_least) | (values > self.at_most) | np.isinf(values)
