"""Megatron-LM's own sample order, for a run that moves over in the middle: shuffled documents, samples that share their
last token, a shuffle of samples, greedy blending. `data.order=megatron` uses it.

Documents here are sequences of the index, as in Megatron. The order depends on how many samples are asked for, so the number of
training steps is part of it. Unlike the keyed order it takes time and memory that grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from megalm.config.data import DataConfig, split_shares
from megalm.config.errors import ConfigError
from megalm.data.native import load_library
from megalm.data.openers import name_sources, open_tokens
from megalm.data.order import Samples
from megalm.data.sources import HeldOutSource, TokenSource
from megalm.data.tokens import TokenFile

SPARE = 1.005  # each source of a blend is asked for half a percent more than its share


def normalize(weights: Sequence[float]) -> list[float]:
    """Shares of the whole. numpy's sum, as in Megatron: another way to add would differ in the last bit, and so would the
    order where two sources are equally far behind."""
    values = np.array(weights, np.float64)
    return (values / np.sum(values)).tolist()


def split_bounds(split: Sequence[float], size: int) -> list[tuple[int, int]]:
    """Split ranges of sequences for training, validation and test. Python's round: halves go to the even number."""
    edges = [0.0, *accumulate(normalize(split))]
    return [(int(round(a * float(size))), int(round(b * float(size)))) for a, b in zip(edges, edges[1:], strict=False)]


class SampleIndex:
    """Which tokens make up which sample of one source.

    Of the sequences [first, stop) of the file, `wanted` samples of `seq_length` + 1 tokens, or those of one epoch; a
    sample's last token is the next one's first.
    """

    def __init__(self, lengths: np.ndarray, first: int, stop: int, wanted: int | None, seq_length: int, seed: int):
        self.seq_length = seq_length
        sizes = np.asarray(lengths[first:stop], np.int64)
        epoch_tokens = int(sizes.sum())
        if epoch_tokens == 0:
            raise ConfigError(f"sequences {first} to {stop} hold no token: there is nothing to order. Give more text.")
        epochs = 1
        while wanted is not None and epochs * epoch_tokens < wanted * seq_length + 1:
            epochs += 1
        without_last = ((epochs - 1) * epoch_tokens - 1) // seq_length if epochs > 1 else 0
        in_epoch = (epoch_tokens - 1) // seq_length
        separate = wanted is not None and epochs > 1 and wanted - without_last < int(0.8 * in_epoch)
        random = np.random.RandomState(seed)
        documents = np.arange(first, stop, dtype=np.int32)
        parts = [np.tile(documents, epochs - 1), documents.copy()] if separate else [np.tile(documents, epochs)]
        for part in parts:
            random.shuffle(part)
        self.documents = np.concatenate(parts)
        self.size = (epochs * epoch_tokens - 1) // seq_length
        self._sizes, self._first = sizes, first
        self._entries, self._offsets = sample_starts(sizes, self.documents, first, self.size + 1, seq_length)
        kind: type = np.uint32 if self.size < np.iinfo(np.uint32).max - 1 else np.int64
        middle = without_last if separate else self.size
        shuffled: list[np.ndarray] = [np.arange(0, middle, dtype=kind), np.arange(middle, self.size, dtype=kind)]
        random.shuffle(shuffled[0])
        if middle != self.size:
            random.shuffle(shuffled[1])
        self.shuffle = np.concatenate(shuffled)

    def place(self, sample: int) -> tuple[int, int]:
        """Before the shuffle of samples: (entry of `documents`, offset in it) of the sample's first token."""
        return int(self._entries[sample]), int(self._offsets[sample])

    def spans(self, index: int) -> list[tuple[int, int, int]]:
        """(sequence, first token, end) of the pieces that make up the sample at this place of the order."""
        entry, offset = self.place(int(self.shuffle[index]))
        wanted = self.seq_length + 1
        spans = []
        while wanted > 0:
            document = int(self.documents[entry])
            taken = min(wanted, int(self._sizes[document - self._first]) - offset)
            if taken > 0:
                spans.append((document, offset, offset + taken))
            wanted, entry, offset = wanted - taken, entry + 1, 0
        return spans


def sample_starts(
    sizes: np.ndarray, order: np.ndarray, first: int, samples: int, seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each sample's first token stands: entry of the documents' order, and offset in that document.

    sizes: tokens of the documents `first` and on; order: documents in their order, which must hold `samples` - 1 whole
    samples and the first token of one more. With `megalm._C` one pass without an array as long as the order.

    Shapes: sizes int64 [documents], order int32 [entries] -> int64 [samples], int64 [samples]
    """
    sizes, order = np.ascontiguousarray(sizes, np.int64), np.ascontiguousarray(order, np.int32)
    native = load_library()
    if native is None:
        return _walk_starts(sizes, order, first, samples, seq_length)
    entries, offsets = np.empty(samples, np.int64), np.empty(samples, np.int64)
    addresses = (array.ctypes.data for array in (order, sizes, entries, offsets))
    native.starts(samples, seq_length, first, *addresses)
    return entries, offsets


def _walk_starts(
    sizes: np.ndarray, order: np.ndarray, first: int, samples: int, seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    starts = np.concatenate(([0], np.cumsum(sizes[order - first])))
    positions = np.arange(samples, dtype=np.int64) * seq_length
    entries = np.searchsorted(starts, positions, side="right") - 1
    return entries, positions - starts[entries]


class MegatronSource(TokenSource):
    """A token file whose samples are put together as Megatron does."""

    def __init__(
        self,
        name: str,
        file: TokenFile,
        seq_length: int,
        weight: float | None,
        split: Sequence[float],
        wanted: int | None,
        seed: int,
    ):
        train, valid = split_bounds([*split, 0, 0][:3], file.num_sequences)[:2]
        super().__init__(name, file, seq_length, weight or 0.0, 0.0)
        file.verify_index()  # every length is used, and the compiled walk over them trusts them
        self.train_tokens, end = self._token(train[1]), self._token(valid[1])
        self.samples = SampleIndex(file.lengths, *train, wanted, seq_length, seed)
        self.num_samples = self.samples.size
        self.weighted = weight is not None
        self.weight = float(self.num_samples) if weight is None else weight
        self._validation_end = end

    def held_out(self) -> TokenSource:
        """The validation split."""
        return HeldOutSource(
            self.name, self.file, self.seq_length, self.weight, first=self.train_tokens, end=self._validation_end
        )

    def _token(self, sequence: int) -> int:
        if sequence >= self.file.num_sequences:
            return self.file.num_tokens
        return int(self.file.pointers[sequence]) // self.file.dtype.itemsize

    def _spans(self, index: int) -> list[tuple[int, int]]:
        return [(self._token(s) + a, self._token(s) + b) for s, a, b in self.samples.spans(index)]

    def read(self, index: int, length: int | None = None) -> np.ndarray:
        return np.concatenate([self.file.read(*span) for span in self._spans(index)])

    def prefetch(self, index: int, length: int) -> None:
        for span in self._spans(index):
            self.file.prefetch(*span)

    def read_into(self, row: np.ndarray, index: int) -> None:
        row[:] = self.read(index)

    def boundaries(self, index: int, length: int | None = None) -> np.ndarray:
        return np.cumsum([b - a for a, b in self._spans(index)])[:-1]

    def token_at(self, index: int, length: int, at: int) -> int:
        for first, end in self._spans(index):
            if at < end - first:
                return first + at
            at -= end - first
        raise IndexError(at)

    def locate(self, index: int, length: int | None = None) -> dict[str, Any]:
        start = self._spans(index)[0][0]
        document = self.file.document_at(start)
        offset = start - self.file.document_start(document)
        return {"document": document, "offset": offset, "token": start, "byte": start * self.file.dtype.itemsize}


def blend(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy blending: sample i goes to the source that is furthest behind its share; the first of equals.

    Shapes: -> source int16 [size], index inside the source int64 [size]
    """
    if not weights or len(weights) > np.iinfo(np.int16).max:
        raise ConfigError(
            f"{len(weights)} sources cannot be blended in Megatron's order: it numbers 1 to 32767 of them."
        )
    shares = normalize(weights)
    sources, indices = np.empty(size, np.int16), np.empty(size, np.int64)
    native = load_library()
    if native is None:
        _blend_step_by_step(shares, sources, indices)
        return sources, indices
    parts, taken = np.asarray(shares, np.float64), np.zeros(len(shares), np.int64)
    native.greedy(len(shares), size, *(array.ctypes.data for array in (parts, taken, sources, indices)))
    return sources, indices


def _blend_step_by_step(shares: Sequence[float], sources: np.ndarray, indices: np.ndarray) -> None:
    counts = [0] * len(shares)
    for i in range(len(sources)):
        at = float(max(i, 1))
        best, lag = 0, shares[0] * at - counts[0]
        for number in range(1, len(shares)):
            behind = shares[number] * at - counts[number]
            if behind > lag:
                best, lag = number, behind
        sources[i], indices[i] = best, counts[best]
        counts[best] += 1


class MegatronStream:
    """The whole run's samples in Megatron's order; the face is that of `megalm.data.stream.Stream`."""

    def __init__(self, sources: Sequence[MegatronSource], wanted: int):
        self.sources, self.wanted = list(sources), wanted
        self.end = wanted if len(sources) > 1 else max(wanted, sources[0].num_samples)
        whole = sum(source.num_samples for source in sources)
        if len(sources) == 1:
            self._order = None
        elif wanted > whole and not sources[0].weighted:
            raise ConfigError(
                f"data.order=megatron without data.weights takes every sample once, {whole} in all, and the run asks for "
                f"{wanted} (train.steps x train.global_batch_size): give fewer steps, or data.weights."
            )
        else:
            self._order = blend([source.weight for source in sources], wanted)
            for source, used in zip(sources, np.bincount(self._order[0], minlength=len(sources)), strict=True):
                if used > source.num_samples:
                    raise ConfigError(
                        f"data source {source.name!r} has {source.num_samples} samples and the blend takes {used}: "
                        f"Megatron's order "
                        "cannot be made with these weights. Use data.order=keyed."
                    )

    def samples(self, positions: np.ndarray) -> Samples:
        """Shapes: positions int64 [N] -> Samples of [N]; `index` counts along the source's own order"""
        positions = np.asarray(positions, np.int64)
        if len(positions) and positions.max() >= self.end:
            raise ConfigError(
                f"data.order=megatron was made for {self.wanted} samples (train.steps x train.global_batch_size), "
                f"and sample "
                f"{positions.max()} is asked for: Megatron's order must know its end. Set train.steps to the whole "
                f"run's."
            )
        if self._order is None:
            return Samples(np.zeros_like(positions), positions, np.zeros_like(positions))
        source, index = self._order
        return Samples(source[positions].astype(np.int64), index[positions], np.zeros_like(positions))

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """What must not change on the way."""
        return {"order": "megatron", "wanted": self.wanted, "sources": {s.name: s.num_samples for s in self.sources}}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Errors: ConfigError if the data, the split, the weights or the number of steps is not what it was."""
        if {**state, "sources": dict(state.get("sources", {}))} != self.state_dict():
            raise ConfigError(
                f"the checkpoint's data order is {state}, the configured one {self.state_dict()}: with "
                f"data.order=megatron the data, "
                "data.split, data.weights, train.steps and train.global_batch_size must stay as they were."
            )


def open_megatron_sources(data: DataConfig, seq_length: int, wanted: int, seed: int) -> list[MegatronSource]:
    """Open the sources of `data.train` with the number of samples that Megatron asks of each.

    With weights each gives its share and half a percent, also a single one; without, several give an epoch each, and one
    all that is wanted.

    Errors: ConfigError if there is not a weight for each source, or the split is not numbers.
    """
    if data.weights is not None and len(data.weights) != len(data.train):
        raise ConfigError(
            f"data.weights has {len(data.weights)} numbers for {len(data.train)} sources: give those of the run that moves "
            "over, or none if it had none."
        )
    split = _split(data)
    shares = normalize(data.weights) if data.weights else None
    sources = []
    for number, (name, prefix) in enumerate(zip(name_sources(data.train), data.train, strict=True)):
        share = shares[number] if shares else None
        asked = None if len(data.train) > 1 else wanted
        if share is not None:
            asked = math.ceil(math.ceil(wanted * share) * SPARE)
        sources.append(MegatronSource(name, open_tokens(prefix, data), seq_length, share, split, asked, seed))
    return sources


def _split(data: DataConfig) -> list[float]:
    if data.split is None:
        return [1.0 - data.holdout, data.holdout] if data.valid is None else [1.0]
    return split_shares(data.split)
