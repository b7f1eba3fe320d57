"""How scores are distributed, what thresholds would drop, and texts from both sides of them: to look at before deciding."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megalm.corpus.dedup.corpus import Corpus, ShardStage
from megalm.corpus.dedup.files import name_shard_file, save
from megalm.corpus.filter.batch import Batch, Bound
from megalm.corpus.filter.reading import Documents
from megalm.corpus.filter.rules import RuleSet

EXCERPT = 600  # characters of a text that is shown
NEAREST = 4  # texts on each side of a threshold
MOST_VALUES = 2_000_000  # of a score that are looked at; of more documents, every so many
BINS = 60
SHARES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(order=True)
class Sample:
    """A text near a threshold; the nearest come first."""

    distance: float
    file: str
    place: str
    value: float
    text: str


@dataclass
class Side:
    """The texts of one side of a threshold that are nearest to it."""

    samples: list[Sample] = field(default_factory=list)

    def merge(self, others: list[Sample]) -> None:
        """Keeps the nearest of both."""
        self.samples = heapq.nsmallest(NEAREST, [*self.samples, *others])


@dataclass(frozen=True)
class Threshold:
    """One limit of a bound."""

    rule: str
    column: str
    limit: float
    is_least: bool
    dropped: Side
    kept: Side


@dataclass(frozen=True)
class Distribution:
    """A score over the documents.

    Shapes: edges float64 [BINS + 1], counts int64 [BINS]; below and above: the values that `at_least` and `at_most` would
    take to drop each of SHARES
    """

    column: str
    known: int
    """Values that were looked at."""
    edges: np.ndarray
    counts: np.ndarray
    mean: float
    below: tuple[float, ...]
    above: tuple[float, ...]


@dataclass(frozen=True)
class Alone:
    """How many documents a rule drops whatever the others do, and how many that no other rule drops."""

    drops: int
    only: int


class Watcher:
    """Collects a shard's statistics while its batches go through the rules."""

    def __init__(self, rules: RuleSet):
        self._bounds = [item for item in rules.items if isinstance(item, Bound)]
        self._columns = rules.columns
        self._parts: list[np.ndarray] = []
        self._sides = {key: (Side(), Side()) for key in _thresholds(self._bounds)}
        self.drops = np.zeros(len(self._bounds), np.int64)
        self.only = np.zeros(len(self._bounds), np.int64)

    def see(self, some: Documents, batch: Batch) -> None:
        """Takes what the rules found of a batch."""
        self._parts.append(np.stack([batch.columns[name] for name in self._columns]).astype(np.float32))
        fails = np.stack([bound.refuses(batch.columns[bound.column]) for bound in self._bounds])
        self.drops += fails.sum(1)
        self.only += (fails & (fails.sum(0) == 1)).sum(1)
        for (number, is_least), sides in self._sides.items():
            bound = self._bounds[number]
            values = batch.columns[bound.column]
            limit = bound.at_least if is_least else bound.at_most
            distance = np.abs(values - limit)
            outside = values < limit if is_least else values > limit
            for side, members in zip(sides, (outside, ~outside), strict=True):
                places = np.flatnonzero(members & np.isfinite(distance))
                places = places[np.argsort(distance[places], kind="stable")[:NEAREST]]
                side.merge([self._sample(some, place, values, distance) for place in places.tolist()])

    @staticmethod
    def _sample(some: Documents, place: int, values: np.ndarray, distance: np.ndarray) -> Sample:
        text = some.texts.at(place)[:EXCERPT]
        return Sample(float(distance[place]), some.piece.label, some.place(place), float(values[place]), text)

    def save(self, stage: ShardStage) -> None:
        """Leaves the scores (float32 [columns, documents]) and the samples in files of the shard."""
        table = np.concatenate(self._parts, axis=1) if self._parts else np.empty((len(self._columns), 0), np.float32)
        save(stage.path("scores"), table)
        samples = [
            [number, is_least, [[asdict(sample) for sample in side.samples] for side in sides]]
            for (number, is_least), sides in self._sides.items()
        ]
        save(stage.path("samples"), np.frombuffer(json.dumps(samples).encode(), np.uint8))


def _thresholds(bounds: list[Bound]) -> Iterator[tuple[int, bool]]:
    for number, bound in enumerate(bounds):
        if np.isfinite(bound.at_least):
            yield number, True
        if np.isfinite(bound.at_most):
            yield number, False


def describe_scores(corpus: Corpus, rules: RuleSet) -> Iterator[Distribution]:
    """Describe the distribution of each score, from what the shards left; one score at a time is held."""
    stride = -(-corpus.documents // MOST_VALUES) if corpus.documents else 1
    for number, column in enumerate(rules.columns):
        parts = [np.empty(0, np.float32)]
        for shard, (start, stop) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:], strict=True)):
            if stop > start:
                path = name_shard_file(corpus.folder, shard, "scores")
                row = np.memmap(path, np.float32, "r", 4 * number * (stop - start), (stop - start,))
                parts.append(np.array(row[-start % stride :: stride]))
        values = np.concatenate(parts).astype(np.float64)
        yield _describe(column, values[np.isfinite(values)])


def _describe(column: str, values: np.ndarray) -> Distribution:
    if len(values) == 0:
        return Distribution(column, 0, np.linspace(0, 1, BINS + 1), np.zeros(BINS, np.int64), 0.0, (), ())
    # Long tails would leave everything in the first bin: there the bins grow in equal proportions.
    low, high, middle = float(values.min()), float(values.max()), float(np.median(values))
    if low >= 0 and high > 20 * max(middle, 1e-3):
        start = max(float(values[values > 0].min(initial=high)), high * 1e-6)
        edges = np.concatenate(([min(low, start)], np.geomspace(start, max(high, start * 1.01), BINS)))
    else:
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = np.histogram(values, edges)[0]
    ordered = np.sort(values)
    at = [min(int(share * len(ordered)), len(ordered) - 1) for share in SHARES]
    return Distribution(
        column,
        len(values),
        edges,
        counts,
        float(values.mean()),
        tuple(float(ordered[place]) for place in at),
        tuple(float(ordered[-1 - place]) for place in at),
    )


def gather_thresholds(corpus: Corpus, rules: RuleSet) -> list[Threshold]:
    """Gather every limit of the rules with the texts nearest to it, over all shards."""
    bounds = [item for item in rules.items if isinstance(item, Bound)]
    found = {
        (number, is_least): Threshold(
            bounds[number].name,
            bounds[number].column,
            bounds[number].at_least if is_least else bounds[number].at_most,
            is_least,
            Side(),
            Side(),
        )
        for number, is_least in _thresholds(bounds)
    }
    for shard in corpus.shards:
        with open(name_shard_file(corpus.folder, shard.number, "samples"), encoding="utf-8") as file:
            content: list[Any] = json.load(file)
        for number, is_least, (dropped, kept) in content:
            threshold = found[number, is_least]
            threshold.dropped.merge([Sample(**sample) for sample in dropped])
            threshold.kept.merge([Sample(**sample) for sample in kept])
    return list(found.values())
