"""Fill-in-the-middle: some documents are rearranged, so that the model learns to write what fits between two ends.

    document              a b c d e f g h                 (three tokens give way to the sentinels)
    PSM   <prefix> a b   <suffix> e      <middle> c d
    SPM   <prefix> <suffix> e            <middle> a b c d

Which documents, where they are cut and in which of the two forms depends on the seed and on the sample's source, number
and epoch only. Rows keep their length; a document's end mark keeps its place.

Source:  Bavarian et al. 2022, Efficient Training of Language Models to Fill in the Middle (arXiv:2207.14255)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalm.config.data import DataConfig
from megalm.config.errors import ConfigError
from megalm.data.order import derive_key, mix
from megalm.tokenizer.tokenizer import load_tokenizer

SHORTEST = 8  # tokens of a document below which there is no middle worth filling
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


class FillInTheMiddle:
    """Rearranges documents of a row with probability `rate`, of these `spm_rate` in the form SPM.

    sentinels: ids of prefix, middle and suffix. eos: id that ends a document, or None.
    """

    def __init__(self, rate: float, spm_rate: float, sentinels: Sequence[int], seed: int, eos: int | None = None):
        self.rate, self.spm_rate, self.seed, self.eos = rate, spm_rate, seed, eos
        self.prefix, self.middle, self.suffix = sentinels

    def apply(self, row: np.ndarray, starts: np.ndarray, filled: int, source: str, index: int, epoch: int) -> None:
        """Rearrange in place. Shapes: row [S + 1]; starts: where documents after the first begin; tokens end at `filled`"""
        base = derive_key(self.seed, "fim", source, index, epoch)
        edges = [0, *(int(start) for start in starts if start < filled), filled]
        for number, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
            if self.eos is not None and end > first and int(row[end - 1]) == self.eos:
                end -= 1
            length = end - first
            if length < SHORTEST:
                continue
            draws = mix(np.array([(base + (4 * number + k + 1) * _GOLDEN) & _MASK64 for k in range(4)], np.uint64))
            chances = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
            if chances[0] >= self.rate:
                continue
            kept = row[first : end - 3].copy()
            low, high = sorted(int(chance * (len(kept) + 1)) for chance in chances[1:3])
            before, between, after = kept[:low], kept[low:high], kept[high:]
            marks = [np.array([mark], row.dtype) for mark in (self.prefix, self.suffix, self.middle)]
            if chances[3] < self.spm_rate:
                parts = [marks[0], marks[1], after, marks[2], before, between]
            else:
                parts = [marks[0], before, marks[1], after, marks[2], between]
            row[first:end] = np.concatenate(parts)


def make_fill_in_the_middle(data: DataConfig, seed: int, vocab_size: int) -> FillInTheMiddle | None:
    """What the configuration asks for; None: nothing.

    Errors: ConfigError for rates outside 0..1, and sentinels that the tokenizer or the vocabulary does not have.
    """
    if data.fim_rate == 0:
        return None
    for name in ("fim_rate", "fim_spm_rate"):
        if not 0 <= getattr(data, name) <= 1:
            raise ConfigError(f"data.{name}={getattr(data, name)}: a probability, from 0 to 1.")
    if len(data.fim_tokens) != 3:
        raise ConfigError(f"data.fim_tokens={data.fim_tokens}: give three: prefix, middle and suffix.")
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    ids = []
    for word in data.fim_tokens:
        number = int(word) if str(word).isdigit() else tokenizer.token_id(word) if tokenizer else None
        if number is None:
            known = f"the tokenizer {data.tokenizer} has no such token" if tokenizer else "data.tokenizer is not given"
            raise ConfigError(
                f"data.fim_tokens: {word!r} is not a token: {known}. Name three special tokens of the tokenizer, or give "
                "ids that the text does not use."
            )
        if not 0 <= number < vocab_size:
            raise ConfigError(f"data.fim_tokens: {word!r} is token {number}, outside model.vocab_size={vocab_size}.")
        ids.append(number)
    if len(set(ids)) < 3:
        raise ConfigError(f"data.fim_tokens={data.fim_tokens}: three different tokens are needed.")
    return FillInTheMiddle(data.fim_rate, data.fim_spm_rate, ids, seed, tokenizer.eos_id if tokenizer else None)
