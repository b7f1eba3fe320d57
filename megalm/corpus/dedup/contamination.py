"""Training text that holds evaluation text: a run of words in common with it, or a short item of it whole.

Words are those of `shingles`: case, punctuation and white space make no difference, and an apostrophe inside a word is
left out, so that "don't" and "dont" are the same. An item of fewer words than a run, but of enough characters, counts
where all its words stand one after another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, ShardStage
from megalm.corpus.dedup.files import load, name_shard_file, save
from megalm.corpus.dedup.places import PLACE
from megalm.corpus.dedup.removal import RECORD, Removals, read_table, save_records
from megalm.corpus.dedup.shingles import hash_run, hash_words, make_shingles
from megalm.corpus.dedup.texts import Texts

WORDS = 13  # as in GPT-3's contamination study (Brown et al. 2020, appendix C)
CHARACTERS = 20  # of a short item: below, everyday phrases are found everywhere
ANCHORS = (8, 5, 3, 2, 1)  # a short item is looked for by its first words, as many of these as it has
_RUN = np.dtype([("value", "<u8"), ("owner", "<i8")])
_PAIR = np.dtype([("number", "<i8"), ("owner", "<i8")])
_APOSTROPHE, _CURLY = 0x27, (0xE2, 0x80, 0x99)


@dataclass(frozen=True)
class Benchmark:
    """One file of the evaluation: its documents, those of which something was found, and the training documents with it."""

    name: str
    items: int
    found: int
    training_documents: int


@dataclass(frozen=True)
class Contamination:
    """What was found."""

    removals: Removals
    too_short: int
    """Documents of the evaluation that are too short to look for."""
    benchmarks: list[Benchmark]


@dataclass(frozen=True)
class _Search:
    """What a shard of the training text is searched for: tables in files, by the words of a run."""

    folder: str
    words: int
    anchors: tuple[int, ...]


def find_contaminated(
    corpus: Corpus, evaluation: Corpus, words: int = WORDS, characters: int = CHARACTERS
) -> Contamination:
    """Find documents that share a run of `words` words with the evaluation text, or hold an item of it that has fewer words, but
    at least so many characters.

    Memory: 16 bytes for each run of the evaluation text, shared by all processes of a machine.
    Errors: ConfigError if no evaluation document is long enough.
    """
    if words < 1 or characters < 1:
        raise ConfigError(f"--words is {words} and --characters {characters}: give at least 1 of each.")
    shards = evaluation.each_shard(_read_evaluation, (words, characters), "evaluation text")
    too_short = sum(found for _, found in shards)
    sizes = (words, *(anchor for anchor in ANCHORS if anchor < words))
    lengths = [_gather_runs(corpus.folder, evaluation, size) for size in sizes]
    if not any(lengths):
        raise ConfigError(
            f"no document of the evaluation text has {words} words, or {characters} characters: pass fewer --words or "
            "--characters."
        )
    _gather_items(corpus.folder, evaluation)
    anchors = tuple(size for size, length in zip(sizes[1:], lengths[1:], strict=True) if length)
    search = _Search(corpus.folder, words if lengths[0] else 0, anchors)
    results = corpus.each_shard(_search_shard, search, "searching")
    paths, pairs = [], [np.empty(0, _PAIR)]
    for start, (_, name) in zip(corpus.starts, results, strict=False):
        rows = load(os.path.join(corpus.folder, name), RECORD)
        rows["number"] += start
        paths.append(f"{name}.numbered")
        save_records(os.path.join(corpus.folder, paths[-1]), rows)
        found = load(os.path.join(corpus.folder, f"{name}.pairs"), _PAIR)
        found["number"] += start
        pairs.append(found)
    why = "{value:.0f} runs of words are in the evaluation text, some of them in its document {other}"
    removals = read_table(corpus, paths, why, (evaluation.folder, evaluation.starts))
    return Contamination(removals, too_short, _count_by_file(evaluation, np.concatenate(pairs)))


def _count_by_file(evaluation: Corpus, pairs: np.ndarray) -> list[Benchmark]:
    """The files of the evaluation in their order."""
    owners: dict[str, list[np.ndarray]] = {}
    for shard, start in zip(evaluation.shards, evaluation.starts, strict=False):
        pieces = load(name_shard_file(evaluation.folder, shard.number, "places"), PLACE)["piece"]
        for number, piece in enumerate(shard.pieces):
            owners.setdefault(piece.label, []).append(np.flatnonzero(pieces == number) + start)
    found = []
    for name, parts in owners.items():
        own = np.concatenate(parts)
        mine = pairs[np.isin(pairs["owner"], own)]
        found.append(Benchmark(name, len(own), len(np.unique(mine["owner"])), len(np.unique(mine["number"]))))
    return found


def _without_apostrophes(texts: Texts) -> Texts:
    """The texts without the two usual apostrophes."""
    data = texts.data
    gone = data == _APOSTROPHE
    if not texts.ascii.all():
        for place in np.flatnonzero(data[:-2] == _CURLY[0]).tolist():
            if data[place + 1] == _CURLY[1] and data[place + 2] == _CURLY[2]:
                gone[place : place + 3] = True
    if not gone.any():
        return texts
    before = np.concatenate(([0], np.cumsum(gone)))
    return Texts(np.ascontiguousarray(data[~gone]), texts.ends - before[texts.ends], texts.ascii)


def _read_evaluation(stage: ShardStage) -> tuple[int, int]:
    """Leaves the runs of long documents, and for short ones their first words and all of them; how many are too short."""
    words, characters = stage.argument
    runs: dict[int, list[np.ndarray]] = {}
    items: list[np.ndarray] = []
    item_ends, owners = [0], []
    too_short = count = 0
    for texts in stage.batches():
        enough = texts.count_characters() >= characters
        texts = _without_apostrophes(texts)
        hashes, ends = hash_words(texts)
        counts = np.diff(ends, prepend=0)
        values, offsets = make_shingles(texts, words)
        owner = np.repeat(np.arange(len(texts)), np.diff(offsets))
        long = counts >= words  # the set of a shorter text is no run of so many words
        runs.setdefault(words, []).append(_make_runs(values[long[owner]], owner[long[owner]] + count))
        for number in np.flatnonzero(~long & enough & (counts > 0)).tolist():
            own = hashes[ends[number] - counts[number] : ends[number]]
            anchor = next(size for size in ANCHORS if size <= len(own))
            first = np.array([hash_run(own[:anchor])], np.uint64)
            runs.setdefault(anchor, []).append(_make_runs(first, np.array([number + count])))
            items.append(own)
            item_ends.append(item_ends[-1] + len(own))
            owners.append(number + count)
        too_short += int((~long & ~(enough & (counts > 0))).sum())
        count += len(texts)
    for size, parts in runs.items():
        save(stage.path(f"runs.{size}"), np.concatenate(parts))
    save(stage.path("items"), np.concatenate([np.empty(0, np.uint64), *items]))
    save(stage.path("item_ends"), np.array(item_ends[1:], "<i8"))
    save(stage.path("item_owners"), np.array(owners, "<i8"))
    return count, too_short


def _make_runs(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    runs = np.empty(len(values), _RUN)
    runs["value"], runs["owner"] = values, owners
    return runs


def _gather_runs(folder: str, evaluation: Corpus, size: int) -> int:
    """Leaves the runs of so many words of all shards, sorted; how many there are."""
    parts = [np.empty(0, _RUN)]
    for shard, start in zip(evaluation.shards, evaluation.starts, strict=False):
        path = name_shard_file(evaluation.folder, shard.number, f"runs.{size}")
        if os.path.exists(path):
            part = load(path, _RUN)
            part["owner"] += start
            parts.append(part)
    runs = np.unique(np.concatenate(parts))
    if len(runs):
        save(os.path.join(folder, f"runs.{size}"), runs)
    return len(runs)


def _gather_items(folder: str, evaluation: Corpus) -> None:
    """Leaves the words of the short items of all shards, where each ends, and its number in the evaluation."""
    items, ends, owners = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
    for shard, start in zip(evaluation.shards, evaluation.starts, strict=False):
        words, bounds, own = (
            load(name_shard_file(evaluation.folder, shard.number, name), kind)
            for name, kind in (("items", "<u8"), ("item_ends", "<i8"), ("item_owners", "<i8"))
        )
        items.append(words)
        owners.append(own + start)
        ends.append(bounds + ends[-1][-1])
    for name, parts in (("items", items), ("item_ends", ends), ("item_owners", owners)):
        save(os.path.join(folder, name), np.concatenate(parts))


def _search_shard(stage: ShardStage) -> tuple[int, str]:
    """Leaves the documents that go, and the pairs of a document and an item of the evaluation that it holds."""
    search: _Search = stage.argument
    tables = {size: _map(search, f"runs.{size}", _RUN) for size in (search.words, *search.anchors) if size}
    items = _ShortItems(search) if search.anchors else None
    rows_parts, pair_parts = [np.empty(0, RECORD)], [np.empty(0, _PAIR)]
    number = 0
    for texts in stage.batches():
        plain = _without_apostrophes(texts)
        pairs, hits = [np.empty(0, _PAIR)], np.zeros(len(texts), np.int64)
        for size, table in tables.items():
            found, runs = _find_runs(plain, size, table)
            if size != search.words:
                assert items is not None  # there are anchors
                found = items.keep_whole(plain, found)
                runs = np.bincount(found["number"], minlength=len(texts))
            hits += runs
            pairs.append(found)
        here = np.unique(np.concatenate(pairs))
        rows = np.zeros(int((hits > 0).sum()), RECORD)
        rows["number"], rows["of"], rows["value"] = np.flatnonzero(hits) + number, -1, hits[hits > 0]
        first = np.flatnonzero(np.diff(here["number"], prepend=-1))
        rows["other"] = here["owner"][first]
        here["number"] += number
        rows_parts.append(rows)
        pair_parts.append(here)
        number += len(texts)
    name = f"{stage.shard.number:06d}.removals"
    save(os.path.join(stage.folder, f"{name}.pairs"), np.concatenate(pair_parts))
    save_records(os.path.join(stage.folder, name), np.concatenate(rows_parts))
    return number, name


def _map(search: _Search, name: str, kind: Any) -> np.ndarray:
    return np.memmap(os.path.join(search.folder, name), kind, "r")


def _find_runs(texts: Texts, size: int, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the pairs of a text and an evaluation document with a run in common, and how many runs each text has.

    Shapes: -> _PAIR [pairs], int64 [texts]
    """
    values, offsets = make_shingles(texts, size)
    keys = table["value"]
    low = np.searchsorted(keys, values)
    hits = np.flatnonzero(keys[np.minimum(low, len(keys) - 1)] == values)
    text = np.searchsorted(offsets, hits, side="right") - 1
    low, high = low[hits], np.searchsorted(keys, values[hits], side="right")
    owners = [table["owner"][start:stop] for start, stop in zip(low.tolist(), high.tolist(), strict=True)]
    pairs = np.empty(int((high - low).sum()), _PAIR)
    if len(pairs):
        pairs["number"], pairs["owner"] = np.repeat(text, high - low), np.concatenate(owners)
    return np.unique(pairs), np.bincount(text, minlength=len(texts))


class _ShortItems:
    """The words of items that have fewer than a run."""

    def __init__(self, search: _Search):
        self._words, self._ends = _map(search, "items", "<u8"), _map(search, "item_ends", "<i8")
        owners = _map(search, "item_owners", "<i8")
        self._places = {owner: place for place, owner in enumerate(owners.tolist())}

    def keep_whole(self, texts: Texts, pairs: np.ndarray) -> np.ndarray:
        """Of pairs found by first words, those of which the text has all words of the item, one after another."""
        kept = np.zeros(len(pairs), bool)
        words, at = np.empty(0, np.uint64), -1
        for number, (text, owner) in enumerate(pairs.tolist()):
            if text != at:  # pairs are sorted by it
                words, at = hash_words([texts.at(text)])[0], text
            place = self._places[owner]
            item = self._words[self._ends[place] : self._ends[place + 1]]
            starts = np.flatnonzero(words[: max(len(words) - len(item) + 1, 0)] == item[0])
            kept[number] = any((words[start : start + len(item)] == item).all() for start in starts.tolist())
        return pairs[kept]
