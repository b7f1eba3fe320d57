"""Training text that holds evaluation text: any run of words in common."""

from __future__ import annotations

import os

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.dedup.corpus import Corpus, ShardStage, save
from megalm.data.dedup.removal import RECORD, Removals, save_records, table
from megalm.data.dedup.shingles import shingles, word_hashes

WORDS = 13  # as in GPT-3's contamination study (Brown et al. 2020, appendix C)


def contaminated(corpus: Corpus, evaluation: Corpus, words: int = WORDS) -> tuple[Removals, int]:
    """Documents that share a run of `words` words with the evaluation text; and its documents that were too short to
    look for.

    Memory: 8 bytes for each run of the evaluation text, shared by all processes of a machine.
    Errors: ConfigError if no evaluation document has that many words.
    """
    if words < 1:
        raise ConfigError(f"--words is {words}: give at least 1.")
    short = sum(too_short for _, too_short in evaluation.each_shard(_runs_of_shard, words))
    parts = [np.fromfile(os.path.join(evaluation.folder, f"{s.number:06d}.runs"), "<u8") for s in evaluation.shards]
    runs = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
    if len(runs) == 0:
        raise ConfigError(f"no document of the evaluation text has {words} words: pass fewer --words.")
    path = os.path.join(corpus.folder, "runs")
    save(path, runs)
    results = corpus.each_shard(_search_shard, (path, words))
    starts = corpus.starts
    paths = []
    for shard, (_, name) in zip(corpus.shards, results, strict=True):
        local = np.fromfile(os.path.join(corpus.folder, name), RECORD)
        local["number"] += starts[shard.number]
        save_records(os.path.join(corpus.folder, name), local)
        paths.append(name)
    return table(corpus, paths, f"{{value:.0f}} runs of {words} words are in the evaluation text"), short


def _runs_of_shard(stage: ShardStage) -> tuple[int, int]:
    words = stage.argument
    parts, short, count = [np.empty(0, np.uint64)], 0, 0
    for texts in stage.batches():
        ends = word_hashes(texts)[1]
        long = [text for text, n in zip(texts, np.diff(ends, prepend=0), strict=True) if n >= words]
        short += len(texts) - len(long)
        count += len(texts)
        if long:
            parts.append(shingles(long, words)[0])
    save(stage.path("runs"), np.unique(np.concatenate(parts)))
    return count, short


def _search_shard(stage: ShardStage) -> tuple[int, str]:
    path, words = stage.argument
    runs = np.memmap(path, np.uint64, "r")
    rows: list[tuple[int, int, int, float]] = []
    number = 0
    for texts in stage.batches():
        values, offsets = shingles(texts, words)
        place = np.minimum(np.searchsorted(runs, values), len(runs) - 1)
        hits = np.concatenate(([0], np.cumsum(runs[place] == values)))
        found = hits[offsets[1:]] - hits[offsets[:-1]]
        rows += [(number + int(text), -1, -1, float(found[text])) for text in np.flatnonzero(found)]
        number += len(texts)
    name = f"{stage.shard.number:06d}.removals"
    save_records(os.path.join(stage.folder, name), np.array(rows, RECORD))
    return number, name
