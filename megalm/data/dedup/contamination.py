"""Training text that holds evaluation text: any run of words in common."""

from __future__ import annotations

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.dedup.removal import Corpus, Removal
from megalm.data.dedup.shingles import shingles, word_hashes

WORDS = 13  # as in GPT-3's contamination study (Brown et al. 2020, appendix C)


def evaluation_runs(evaluation: Corpus, words: int) -> tuple[np.ndarray, int]:
    """Sorted hashes of all runs of the evaluation text, and how many of its documents are too short to have one."""
    parts, short = [], 0
    for texts in evaluation.batches():
        ends = word_hashes(texts)[1]
        long = [text for text, count in zip(texts, np.diff(ends, prepend=0), strict=True) if count >= words]
        short += len(texts) - len(long)
        if long:
            parts.append(shingles(long, words)[0])
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64), short


def contaminated(corpus: Corpus, evaluation: Corpus, words: int = WORDS) -> tuple[dict[int, Removal], int]:
    """Documents that share a run of `words` words with the evaluation text; and its documents that were too short to look for.

    Errors: ConfigError if no evaluation document has that many words.
    """
    if words < 1:
        raise ConfigError(f"--words is {words}: give at least 1.")
    runs, short = evaluation_runs(evaluation, words)
    if len(runs) == 0:
        raise ConfigError(f"no document of the evaluation text has {words} words: pass fewer --words.")
    removals: dict[int, Removal] = {}
    number = 0
    for texts in corpus.batches():
        values, offsets = shingles(texts, words)
        place = np.minimum(np.searchsorted(runs, values), len(runs) - 1)
        hits = np.concatenate(([0], np.cumsum(runs[place] == values)))
        for text, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            if found := int(hits[stop] - hits[start]):
                removals[number + text] = Removal(None, f"{found} runs of {words} words are in the evaluation text")
        number += len(texts)
    return removals, short
