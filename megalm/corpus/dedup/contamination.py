"""Training text that holds evaluation text: any run of words in common."""

from __future__ import annotations

import os

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, ShardStage
from megalm.corpus.dedup.files import load, name_shard_file, save
from megalm.corpus.dedup.removal import RECORD, Removals, read_table, save_records
from megalm.corpus.dedup.shingles import hash_words, make_shingles

WORDS = 13  # as in GPT-3's contamination study (Brown et al. 2020, appendix C)


def find_contaminated(corpus: Corpus, evaluation: Corpus, words: int = WORDS) -> tuple[Removals, int]:
    """Documents that share a run of `words` words with the evaluation text; and its documents that were too short to
    look for.

    Memory: 16 bytes for each run of the evaluation text, shared by all processes of a machine.
    Errors: ConfigError if no evaluation document has that many words.
    """
    if words < 1:
        raise ConfigError(f"--words is {words}: give at least 1.")
    short = sum(too_short for _, too_short in evaluation.each_shard(_runs_of_shard, words, "evaluation text"))
    runs, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for shard, start in zip(evaluation.shards, evaluation.starts, strict=False):
        runs.append(load(name_shard_file(evaluation.folder, shard.number, "runs"), "<u8"))
        owners.append(load(name_shard_file(evaluation.folder, shard.number, "owners"), "<i8") + start)
    values, first = np.unique(np.concatenate(runs), return_index=True)
    if len(values) == 0:
        raise ConfigError(f"no document of the evaluation text has {words} words: pass fewer --words.")
    path = os.path.join(corpus.folder, "runs")
    save(path, values)
    save(f"{path}.owners", np.concatenate(owners)[first])
    results = corpus.each_shard(_search_shard, (path, words), "searching")
    paths = []
    for start, (_, name) in zip(corpus.starts, results, strict=False):
        rows = load(os.path.join(corpus.folder, name), RECORD)
        rows["number"] += start
        paths.append(f"{name}.numbered")
        save_records(os.path.join(corpus.folder, paths[-1]), rows)
    why = f"{{value:.0f}} runs of {words} words are in the evaluation text, some of them in its document {{other}}"
    return read_table(corpus, paths, why, (evaluation.folder, evaluation.starts)), short


def _runs_of_shard(stage: ShardStage) -> tuple[int, int]:
    words = stage.argument
    runs, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    short = count = 0
    for texts in stage.batches():
        values, offsets = make_shingles(texts, words)
        long = np.diff(hash_words(texts)[1], prepend=0) >= words  # the set of a shorter text is no run of so many words
        owner = np.repeat(np.arange(len(texts)), np.diff(offsets))
        runs.append(values[long[owner]])
        owners.append(owner[long[owner]] + count)
        short += len(texts) - int(long.sum())
        count += len(texts)
    values, first = np.unique(np.concatenate(runs), return_index=True)
    save(stage.path("runs"), values)
    save(stage.path("owners"), np.concatenate(owners)[first])
    return count, short


def _search_shard(stage: ShardStage) -> tuple[int, str]:
    path, words = stage.argument
    runs, owners = np.memmap(path, np.uint64, "r"), np.memmap(f"{path}.owners", np.int64, "r")
    parts = [np.empty(0, RECORD)]
    number = 0
    for texts in stage.batches():
        values, offsets = make_shingles(texts, words)
        place = np.minimum(np.searchsorted(runs, values), len(runs) - 1)
        hits = np.flatnonzero(runs[place] == values)
        text = np.searchsorted(offsets, hits, side="right") - 1  # ascending
        begins = np.flatnonzero(np.diff(text, prepend=-1))
        rows = np.zeros(len(begins), RECORD)
        rows["number"], rows["of"] = number + text[begins], -1
        if len(begins):
            rows["other"] = np.minimum.reduceat(owners[place[hits]], begins)
            rows["value"] = np.diff(begins, append=len(hits))
        parts.append(rows)
        number += len(texts)
    name = f"{stage.shard.number:06d}.removals"
    save_records(os.path.join(stage.folder, name), np.concatenate(parts))
    return number, name
