"""The stream of samples of a run: sources with their weights, which may change on the way, and ranges that are skipped.

The whole state is a position, the ranges to skip, and one short record for each time the mixture was changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.blend import make_blend
from megalm.data.order import Samples, Source, check_sources, derive_key, resolve, shuffle_indices


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream with one mixture: where it starts, and what each source had given before."""

    start: int
    weights: dict[str, float]
    before: dict[str, int]
    blend: str = "chairman"
    """How it is dealt; a stream that was begun another way goes on that way until its mixture is changed."""
    parts: int = 1
    """A sample of the stream is one part of so many of a source's sample; the parts of one follow each other."""

    def like(self, other: Segment) -> bool:
        """Whether going over from one to the other changes nothing."""
        return _shares(self.weights) == _shares(other.weights) and self.parts == other.parts


@dataclass(frozen=True)
class Reseed:
    """From a position on, what is left of each source comes in another order: what each source had given before it."""

    position: int
    seed: int
    before: dict[str, int]


class Stream:
    """position -> sample, over all changes of the mixture; a source's samples are never given twice in an epoch.

    A source keeps its own count across changes: after one, it goes on where it was.
    """

    end = 1 << 60  # positions below this exist

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        segments: Sequence[Segment] = (),
        *,
        shuffle: bool = True,
        window: int = 0,
    ):
        check_sources(sources)
        self.sources, self.seed, self.shuffle, self.window = list(sources), seed, shuffle, window
        first = Segment(0, {s.name: s.weight for s in sources}, {})
        self.segments = list(segments) or [first]
        self.reseeds: list[Reseed] = []
        self._prepare()

    def _prepare(self) -> None:
        names = [source.name for source in self.sources]
        self._starts = [segment.start for segment in self.segments]
        self._blends = [make_blend(s.blend, [s.weights.get(name, 0.0) for name in names]) for s in self.segments]
        self._before = [np.array([s.before.get(name, 0) for name in names], np.int64) for s in self.segments]

    def samples(self, positions: np.ndarray) -> Samples:
        """Shapes: positions int64 [N] -> Samples of [N]"""
        positions = np.asarray(positions, np.int64)
        source, rank = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        part, parts = np.zeros(len(positions), np.int64), np.ones(len(positions), np.int64)
        segment = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(segment):
            where = np.nonzero(segment == number)[0]
            chosen, count = self._blends[number].assign(positions[where] - self._starts[number])
            parts[where] = self.segments[number].parts
            count, part[where] = np.divmod(count, self.segments[number].parts)
            source[where], rank[where] = chosen, count + self._before[number][chosen]
        rank = self._reordered(positions, source, rank)
        whole = resolve(self.sources, self.seed, source, rank, shuffle=self.shuffle, window=self.window)
        return Samples(source, whole.index * parts + part, whole.epoch, parts)

    def reseed(self, position: int, seed: int) -> None:
        """From this position on, the samples that this epoch still holds come in another order, and so do later epochs.

        Each is still given exactly once an epoch.
        """
        self.reseeds.append(Reseed(position, seed, self.counts(position)))

    def _reordered(self, positions: np.ndarray, source: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Places within each source's own order, after all changes of it. Shapes: all int64 [N] -> int64 [N]"""
        for reseed in reversed(self.reseeds):  # a later change orders what the earlier one left
            for number, item in enumerate(self.sources):
                given = reseed.before.get(item.name, 0)  # a source that was added later had given nothing
                where = np.nonzero((positions >= reseed.position) & (source == number) & (rank >= given))[0]
                for epoch in np.unique(rank[where] // max(1, item.samples)):
                    inside = where[rank[where] // item.samples == epoch]
                    first = max(given, int(epoch) * item.samples)
                    left = (int(epoch) + 1) * item.samples - first
                    keys = np.full(len(inside), derive_key(reseed.seed, item.name, epoch), np.uint64)
                    rank[inside] = first + shuffle_indices(rank[inside] - first, left, keys, self.window)
        return rank

    def counts(self, position: int) -> dict[str, int]:
        """How many of its own samples each source has given before this position; one given in part counts."""
        number = bisect_right(self._starts, position) - 1
        parts = self.segments[number].parts
        counts = -(-self._blends[number].counts(position - self._starts[number]) // parts) + self._before[number]
        return {source.name: int(count) for source, count in zip(self.sources, counts, strict=True)}

    def follow(self, position: int, upcoming: Sequence[tuple[int, dict[str, float], int]]) -> None:
        """From this position on, mixtures as in `upcoming`: (start, weights, parts), the first from the position itself.

        What lies before stays as it was; a mixture that goes on as before makes no new segment.
        """
        self.segments = [s for s in self.segments if s.start <= position]
        for start, weights, parts in upcoming:
            wanted = Segment(start, dict(weights), {}, parts=parts)
            if self.segments and self.segments[-1].like(wanted):
                continue
            self.segments = [s for s in self.segments if s.start < start]
            before = {}
            if self.segments:
                self._prepare()
                before = self.counts(start)
            self.segments.append(replace(wanted, before=before))
        self._prepare()

    def change(self, position: int, weights: dict[str, float]) -> None:
        """From this position on, the sources come with these weights."""
        self.follow(position, [(position, weights, 1)])

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Sizes of the sources, to notice that the data is not the same any more, and the mixtures up to a position."""
        segments = [s for s in self.segments if position is None or s.start <= position]
        return {
            "sources": {source.name: source.samples for source in self.sources},
            "window": self.window,
            "reseeds": [
                {"position": r.position, "seed": r.seed, "before": r.before}
                for r in self.reseeds
                if position is None or r.position <= position
            ],
            "segments": [
                {"start": s.start, "weights": s.weights, "before": s.before, "blend": s.blend, "parts": s.parts}
                for s in segments
            ],
        }

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Takes up a saved stream as it was up to `position`.

        Errors: ConfigError if a source that was used has another size now, or is gone.
        """
        if state.get("window", 0) != self.window:
            raise ConfigError(
                f"data.shuffle_window was {state.get('window', 0)} when the checkpoint was written and is {self.window} now: "
                "samples would be seen twice. Keep it as it was."
            )
        if "segments" not in state:
            raise ConfigError(
                f"the checkpoint's data order is {state.get('order', 'another one')}, the configured one keyed: keep data.order "
                "as it was."
            )
        sizes = {source.name: source.samples for source in self.sources}
        segments = [
            Segment(s["start"], dict(s["weights"]), dict(s["before"]), s.get("blend", "tree"), s.get("parts", 1))
            for s in state["segments"]
            if s["start"] <= position
        ]
        used = {name for s in segments for name, weight in s.weights.items() if weight > 0}
        for name, samples in state["sources"].items():
            if name in used and sizes.get(name) != samples:
                now = "is not configured" if name not in sizes else f"now holds {sizes[name]} samples"
                raise ConfigError(
                    f"data source {name!r} held {samples} samples when the checkpoint was written, but {now}: its order "
                    "would change and samples would be seen twice. Keep the file, data.holdout and model.seq_length as "
                    "they were; to stop using a source set its weight to 0, and add new text as a source of its own."
                )
        self.segments = segments
        self.reseeds = [Reseed(r["position"], r["seed"], dict(r["before"])) for r in state.get("reseeds", ())]
        self._prepare()


def _shares(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: round(weight / total, 12) for name, weight in weights.items() if weight > 0}


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open ranges, sorted, overlapping and touching ones joined."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted((int(a), int(b)) for a, b in ranges if b > a):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def take(position: int, count: int, skipped: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Take the next `count` positions from `position` on that lie in no skipped range, and the position after the last of
    them.

    Shapes: -> int64 [count]
    """
    parts: list[np.ndarray] = []
    for first, last in skipped:
        if last <= position:
            continue
        free = min(count, max(0, first - position))
        parts.append(np.arange(position, position + free, dtype=np.int64))
        count -= free
        position += free
        if count == 0:
            break
        position = last
    parts.append(np.arange(position, position + count, dtype=np.int64))
    return np.concatenate(parts), position + count


def take_back(end: int, count: int, skipped: Sequence[tuple[int, int]]) -> np.ndarray:
    """The last `count` positions before `end` that lie in no skipped range. Shapes: -> int64 [count]"""
    parts: list[np.ndarray] = []
    for first, last in reversed(skipped):
        if first >= end:
            continue
        free = min(count, max(0, end - last))
        parts.append(np.arange(end - free, end, dtype=np.int64))
        count -= free
        end = min(end, first) if count else end
    parts.append(np.arange(max(0, end - count), end, dtype=np.int64)[: max(count, 0)])
    return np.concatenate(parts[::-1])


def advance(position: int, count: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The position after the next `count` positions that lie in no skipped range."""
    for first, last in skipped:
        if last <= position:
            continue
        free = max(0, first - position)
        if count <= free:
            break
        position, count = last, count - free
    return position + count
