"""From token files to the micro-batches of one data rank, in an order that no layout and no restart changes."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from megalm.config.errors import ConfigError
from megalm.config.phases import list_configured_spans
from megalm.config.root import Config
from megalm.data.batch import Batch
from megalm.data.blend import Tree
from megalm.data.fim import make_fill_in_the_middle
from megalm.data.megatron_order import MegatronStream, open_megatron_sources
from megalm.data.openers import open_held_out, open_sources
from megalm.data.order import Samples, Source, resolve
from megalm.data.pair_batch import add_pairs
from megalm.data.pairs import count_most_pairs
from megalm.data.phases import Curriculum, Phase, make_curriculum, make_single_phase
from megalm.data.separate import separate_documents
from megalm.data.sources import TokenSource
from megalm.data.stream import Stream, advance, merge_ranges, take

SLOW_ROW_S = 5e-5  # to read a row takes a few microseconds from memory, and more than this from any disk
COLD_BATCHES = 64  # asked for ahead, all rows at once, after a row was not in memory: asking costs a tenth of reading
AHEAD = 4096  # samples whose place is looked up at once: two milliseconds


class DataAxis(Protocol):
    """What the loader needs of the mesh's data axis."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...


class Loader:
    """Micro-batches of one data rank; the state is a position in the stream and the ranges to skip.

    Row i of a global batch is the same sample whatever the layout: the global batch is cut into micro-batches in its
    own order, and the ranks take consecutive ones (the first ranks one more, where they do not divide evenly). A
    background thread prepares `data.prefetch` batches ahead.

    Errors: ConfigError for missing or broken files, batches that do not divide, a token outside the vocabulary.
    """

    def __init__(self, config: Config, axis: DataAxis):
        data, train = config.data, config.train
        self.global_batch_size, self.micro_batch_size = train.global_batch_size, train.micro_batch_size
        self.seq_length, self.vocab_size = config.model.seq_length, config.model.vocab_size
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"train.global_batch_size is {self.global_batch_size}, which "
                f"train.micro_batch_size={self.micro_batch_size} "
                "does not divide: choose a multiple of it."
            )
        micro_batches = self.global_batch_size // self.micro_batch_size
        if micro_batches < axis.size:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} makes {micro_batches} micro-batches of "
                f"{self.micro_batch_size}, "
                f"fewer than the {axis.size} data-parallel ranks: enlarge it, or make train.micro_batch_size smaller."
            )
        self._axis = axis
        self.packing = data.packing
        self.sources, self._stream, self.curriculum = self._open(config)
        self.held_out: list[TokenSource] = open_held_out(data, self.seq_length, self.sources)
        self._most_pairs = count_most_pairs([*self.sources, *self.held_out])
        files = [source.file for source in [*self.sources, *self.held_out]]
        self._dtype = np.result_type(*(file.dtype.newbyteorder("=") for file in files))
        self._fim = make_fill_in_the_middle(data, train.seed, self.vocab_size)
        if self._fim is not None:  # the marks may not fit into the files' type
            self._dtype = np.result_type(self._dtype, np.int32)
        self._has_targets = any(file.targets is not None for file in files)
        self._refuse_targets_out_of_place([*self.sources, *self.held_out], data.order)
        self._known: tuple[int, Samples | None] = (0, None)  # first position, and the samples from there on
        self._cold = sys.maxsize if any(source.file.cache for source in self.sources) else COLD_BATCHES
        self._eval_sequences = train.eval_sequences
        self._position = 0
        self._batches = 0  # global batches given out
        self._skipped: list[tuple[int, int]] = []
        self._contents: dict[str, str | None] = {}  # fingerprints from the checkpoint, for sources that have none now
        self._plan()
        self._prefetch = max(0, data.prefetch)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data") if self._prefetch else None
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()  # (position after the batch, the batch)

    def _open(self, config: Config) -> tuple[list[TokenSource], Stream | MegatronStream, Curriculum]:
        data, seed = config.data, config.train.seed
        if data.order == "megatron":
            if config.train.steps is None:
                raise ConfigError("data.order=megatron must know the whole run's length: set train.steps.")
            wanted = config.train.steps * self.global_batch_size
            ordered = open_megatron_sources(data, self.seq_length, wanted, seed)
            weights = {source.name: source.weight for source in ordered}
            curriculum = make_single_phase(weights, self.seq_length, self.global_batch_size)
            return list(ordered), MegatronStream(ordered, wanted), curriculum
        sources = open_sources(data, self.seq_length)
        weights = {source.name: source.weight for source in sources}
        if data.phases:
            curriculum = make_curriculum(
                list_configured_spans(config), weights, {s.name: s.train_tokens for s in sources}
            )
        else:
            curriculum = make_single_phase(weights, self.seq_length, self.global_batch_size)
        highest = {name: max(phase.weights.get(name, 0.0) for phase in curriculum.phases) for name in weights}
        return (
            sources,
            Stream([Source(s.name, s.num_samples, highest[s.name]) for s in sources], seed, window=data.shuffle_window),
            curriculum,
        )

    def _refuse_targets_out_of_place(self, sources: Sequence[TokenSource], order: str) -> None:
        """Weights of targets stand beside the tokens as they lie in the file."""
        found = next((source.file for source in sources if source.file.targets is not None), None)
        if found is None:
            return
        if self._fim is not None:
            raise ConfigError(f"data.fim_rate rearranges documents, and {found.prefix}.targets says which of their tokens count: "
                              "set data.fim_rate=0.")  # fmt: skip
        if order == "megatron":
            raise ConfigError(
                f"data.order=megatron knows no targets, and there is {found.prefix}.targets: use data.order=keyed."
            )

    def _plan(self) -> None:
        """Lay the rest of the curriculum out over the stream, from here on: each phase gets all its batches, however
        many samples are skipped.
        """
        if isinstance(self._stream, MegatronStream):
            return
        upcoming, start = [], self._position
        current = self.phase
        for phase in self.curriculum.phases[self.curriculum.phases.index(current) :]:
            upcoming.append((start, phase.weights, self.seq_length // phase.seq_length))
            if phase.end_step is not None:
                steps = phase.end_step - max(phase.first_step, self._batches)
                start = advance(start, steps * phase.global_batch_size, self._skipped)
        self._stream.follow(self._position, upcoming)

    @property
    def phase(self) -> Phase:
        """The phase of the next global batch."""
        return self.curriculum.at(self._batches)

    def phase_at(self, step: int) -> Phase:
        """The phase of update number `step`, counted from 0."""
        return self.curriculum.at(step)

    @property
    def source_names(self) -> list[str]:
        """Names of what is mixed, in the order in which a batch's `sources` counts them."""
        return [source.name for source in self.sources]

    def _rows(self, phase: Phase) -> slice:
        """This rank's rows of a global batch: whole micro-batches, the first ranks one more where they do not divide."""
        share, extra = divmod(phase.global_batch_size // self.micro_batch_size, self._axis.size)
        first = self._axis.rank * share + min(self._axis.rank, extra)
        count = share + (self._axis.rank < extra)
        return slice(first * self.micro_batch_size, (first + count) * self.micro_batch_size)

    @property
    def samples_consumed(self) -> int:
        """Position in the stream: samples given out so far, with the skipped ones that lay before."""
        return self._position

    def next(self) -> list[Batch]:
        """The micro-batches of this rank in the next global batch."""
        while len(self._ahead) < self._prefetch + 1:
            position = self._ahead[-1][0] if self._ahead else self._position
            phase = self.curriculum.at(self._batches + len(self._ahead))
            rows, position = take(position, phase.global_batch_size, self._skipped)
            work = (rows[self._rows(phase)], phase.seq_length)
            self._ahead.append(
                (position, self._pool.submit(self._load, *work) if self._pool else _done(self._load(*work)))
            )
        position, future = self._ahead.popleft()
        batches = future.result()
        self._position = position
        self._batches += 1
        return batches

    def next_positions(self) -> np.ndarray:
        """Positions in the stream that the next global batch takes, all ranks together. Shapes: -> int64 [global
        batch]
        """
        return take(self._position, self.phase.global_batch_size, self._skipped)[0]

    def skip(self, first_sample: int, last_sample: int) -> None:
        """Positions [first_sample, last_sample) of the stream will not be given out (any more)."""
        if not 0 <= first_sample <= last_sample:
            raise ValueError(f"cannot skip from {first_sample} to {last_sample}")
        self._skipped = merge_ranges([*self._skipped, (first_sample, last_sample)])
        self._forget()
        self._plan()

    def reseed(self, seed: int, position: int | None = None) -> bool:
        """From here on (or from another position), what is left of the data comes in another order, each sample once as
        before. False where the order is not ours to change (data.order=megatron)."""
        if isinstance(self._stream, MegatronStream):
            return False
        self._forget()
        self._stream.reseed(self._position if position is None else position, seed)
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as plain JSON values."""
        return {
            "samples_consumed": self._position,
            "batches": self._batches,
            "skipped": [list(pair) for pair in self._skipped],
            "stream": self._stream.state_dict(self._position),
            "contents": {s.name: s.fingerprint or self._contents.get(s.name) for s in self.sources},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state, on any layout; what was changed in the configuration's mixture or phases starts
        here.
        """
        self._forget()
        self._position = int(state["samples_consumed"])
        self._skipped = merge_ranges([(a, b) for a, b in state["skipped"]])
        self._batches = int(state.get("batches", self._position // self.global_batch_size))
        self._stream.load_state_dict(state["stream"], self._position)
        self._check_contents(state)
        self._plan()

    def _check_contents(self, state: dict[str, Any]) -> None:
        """A source is known by its name, wherever its file lies now; what it holds must be what it held."""
        segments = state["stream"].get("segments")
        used = None if segments is None else {n for s in segments for n, weight in s["weights"].items() if weight > 0}
        before = self._contents = state.get("contents", {})
        for source in self.sources:
            held = before.get(source.name)
            if held is None or source.fingerprint in (None, held) or (used is not None and source.name not in used):
                continue
            raise ConfigError(
                f"data source {source.name!r} ({source.file.tokens_path}) holds other tokens than when the checkpoint was "
                "written: what was seen would not be what is recorded. Give the file that it was trained on (it may lie "
                "elsewhere under the same name); add new text as a source of its own."
            )

    def bind(self, engine: object) -> None:
        """Nothing: batches are read, whatever the run is made of."""

    def measure(self) -> dict[str, float]:
        """Nothing beside what the run measures itself."""
        return {}

    def close(self) -> None:
        """Ends the background thread."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def describe(self, positions: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """For each position of the stream: source, epoch, sample, and where its tokens lie."""
        samples = self._stream.samples(np.asarray(positions))
        lengths = self.seq_length // np.broadcast_to(samples.parts, samples.index.shape)
        return [
            {
                "position": int(p),
                "source": self.sources[s].name,
                "epoch": int(e),
                "sample": int(i),
                **self.sources[s].locate(int(i), int(n)),
            }
            for p, s, i, e, n in zip(positions, samples.source, samples.index, samples.epoch, lengths, strict=True)
        ]

    def tokens(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The samples at these positions of the stream, as they are trained on; of one phase.

        Shapes: positions [N] -> int64 [N, S + 1]
        """
        samples = self._stream.samples(np.asarray(positions))
        length = self.seq_length // int(np.max(samples.parts))
        rows = self._rows_of(samples.source, samples.index)
        return self._read(rows, samples.epoch, length)[0].astype(np.int64)

    def evaluation_batches(self, sequences: int | None = None) -> list[Batch]:
        """This rank's micro-batches of held-out text: the same on every call, as many on every rank, padded with
        weight 0.

        The text is laid out as the training text is: packed, kept apart by documents, rearranged by fill-in-the-middle.
        The sequences are drawn from the held-out end of every source by the mixture's weights, each at most once.
        """
        wanted = self._eval_sequences if sequences is None else sequences
        held = [Source(s.name, s.num_samples, s.weight if s.num_samples else 0.0) for s in self.held_out]
        if wanted <= 0 or not any(s.weight > 0 for s in held):
            return []
        mixture = Tree([s.weight for s in held])
        wanted = min(wanted, sum(s.samples for s in held if s.weight > 0))
        drawn = resolve(held, 0, *mixture.assign(np.arange(8 * wanted)))
        keep = np.nonzero(drawn.epoch == 0)[0][:wanted]
        rows = [(int(drawn.source[k]), int(drawn.index[k])) for k in keep]
        step = self.micro_batch_size * self._axis.size
        batches = []
        for at in range(0, len(rows), step):
            start = at + self._axis.rank * self.micro_batch_size
            own = rows[start : start + self.micro_batch_size]
            batches.append(self._padded_batch([(self.held_out[source], number) for source, number in own]))
        return batches

    def _forget(self) -> None:
        for _, future in self._ahead:
            if not future.cancel():
                wait([future])  # it reads what is about to change
        self._ahead.clear()
        self._known = (0, None)

    def _resolve(self, positions: np.ndarray) -> Samples:
        """The sample at each position; looked up AHEAD at a time, as a look-up costs about the same for 30 and for 3,000."""
        first, known = self._known
        if known is None or positions[0] < first or positions[-1] >= first + len(known.source):
            first = int(positions[0])
            end = max(first + AHEAD, int(positions[-1]) + 1)
            known = self._stream.samples(np.arange(first, max(min(end, self._stream.end), int(positions[-1]) + 1)))
            self._known = first, known
        at = positions - first
        return Samples(known.source[at], known.index[at], known.epoch[at])

    def _load(self, positions: np.ndarray, length: int) -> list[Batch]:
        found = self._resolve(positions)
        if self._cold > 0:
            self._cold -= 1
            for source, index in zip(found.source.tolist(), found.index.tolist(), strict=True):
                self.sources[source].prefetch(index, length)
        parts = [slice(at, at + self.micro_batch_size) for at in range(0, len(positions), self.micro_batch_size)]
        return [self._micro_batch(found.source[p], found.index[p], found.epoch[p], length) for p in parts]

    def _rows_of(self, source: np.ndarray, index: np.ndarray) -> list[tuple[TokenSource, int]]:
        return [(self.sources[s], i) for s, i in zip(source.tolist(), index.tolist(), strict=True)]

    def _read(
        self, rows: Sequence[tuple[TokenSource, int]], epoch: np.ndarray, length: int
    ) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
        """Read rows (source, sample), where documents begin in each, and how many tokens each has; the latter only where they
        are used.

        Shapes: rows and epoch [N] -> [N, length + 1]
        """
        raw = np.empty((len(rows), length + 1), self._dtype)
        begun = time.perf_counter()
        for row, (where, sample) in zip(raw, rows, strict=True):
            where.read_into(row, sample)
        if time.perf_counter() - begun > SLOW_ROW_S * len(rows):
            self._cold = COLD_BATCHES
        self._check(raw, lambda row, at: (rows[row][0], rows[row][0].token_at(rows[row][1], length, at)))
        if self.packing == "stream" and self._fim is None:
            return raw, [], []
        starts = [where.boundaries(sample, length) for where, sample in rows]
        filled = [where.filled(sample, length) for where, sample in rows]
        if self._fim is not None:
            for k, (where, sample) in enumerate(rows):
                self._fim.apply(raw[k], starts[k], filled[k], where.name, sample, int(epoch[k]))
        return raw, starts, filled

    def _micro_batch(self, source: np.ndarray, index: np.ndarray, epoch: np.ndarray, length: int) -> Batch:
        rows = self._rows_of(source, index)
        raw, starts, filled = self._read(rows, epoch, length)
        targets = self._read_targets(rows, length)
        sources = torch.from_numpy(source) if len(self.sources) > 1 else None
        batch = Batch(*_shift(raw), loss_mask=targets, sources=sources)
        if self.packing == "stream":
            return batch
        mask, positions, ids = separate_documents(starts, length, filled)
        if targets is not None:
            mask *= targets
        batch = replace(batch, loss_mask=mask, positions=positions, document_ids=ids)
        return add_pairs(batch, rows, self._most_pairs) if self.packing == "pairs" else batch

    def _read_targets(self, rows: Sequence[tuple[TokenSource, int]], length: int) -> torch.Tensor | None:
        """Read what each label counts in the loss, where a file says it. Shapes: rows [N] -> fp32 [N, length]"""
        if not self._has_targets or all(where.file.targets is None for where, _ in rows):
            return None
        weights = np.empty((len(rows), length + 1), np.float32)
        for row, (where, sample) in zip(weights, rows, strict=True):
            where.read_targets_into(row, sample)
        return torch.from_numpy(weights[:, 1:].copy())

    def read_all(self, source: TokenSource) -> Iterator[tuple[range, Batch]]:
        """Read every sample of a source once, in its order: this rank's micro-batches, as many on every rank, and which samples
        their first rows are; the other rows are padding."""
        step = self.micro_batch_size * self._axis.size
        for at in range(0, source.num_samples, step):
            start = min(at + self._axis.rank * self.micro_batch_size, source.num_samples)
            numbers = range(start, min(start + self.micro_batch_size, source.num_samples))
            yield numbers, self._padded_batch([(source, number) for number in numbers])

    def _padded_batch(self, placed: Sequence[tuple[TokenSource, int]]) -> Batch:
        """Whole samples, (source, number), as one micro-batch; rows that it lacks are padding."""
        length, missing = self.seq_length, self.micro_batch_size - len(placed)
        raw, starts, _ = self._read(placed, np.zeros(len(placed), np.int64), length)
        batch = Batch(*_shift(np.concatenate([raw, np.zeros((missing, length + 1), raw.dtype)])))
        filled = [source.filled(number, length) for source, number in placed] + [1] * missing
        apart = self.packing != "stream"
        starts = [*(starts if apart else [_NOWHERE] * len(placed)), *[_NOWHERE] * missing]
        mask, positions, ids = separate_documents(starts, length, filled)
        targets = self._read_targets(placed, length)
        if targets is not None:
            mask[: len(placed)] *= targets
        batch = replace(batch, loss_mask=mask)
        if not apart:
            return batch
        batch = replace(batch, positions=positions, document_ids=ids)
        return add_pairs(batch, placed, self._most_pairs) if self.packing == "pairs" else batch

    def _check(self, tokens: np.ndarray, place: Callable[[int, int], tuple[TokenSource, int]]) -> None:
        """place: from (row, column) to the source and which of its tokens that is."""
        if not len(tokens):
            return
        low, high = int(tokens.min()) if tokens.dtype.kind == "i" else 0, int(tokens.max())
        if low >= 0 and high < self.vocab_size:
            return
        row, at = (int(number) for number in np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0])
        source, token = place(row, at)
        raise ConfigError(
            f"{source.file.tokens_path}: byte {token * source.file.dtype.itemsize}: holds the token {tokens[row, at]} (document "
            f"{source.file.document_at(token)}), outside model.vocab_size={self.vocab_size}. Tokenize with the model's "
            "tokenizer, or set model.vocab_size to the tokenizer's."
        )


_NOWHERE = np.empty(0, np.int64)
"""Where documents begin in a row that is taken for one."""


def _shift(raw: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut inputs and, one further, their labels. Shapes: [B, S + 1] -> [B, S] each"""
    return torch.from_numpy(raw[:, :-1].astype(np.int64)), torch.from_numpy(raw[:, 1:].astype(np.int64))


def _done(batches: list[Batch]) -> Future[list[Batch]]:
    future: Future[list[Batch]] = Future()
    future.set_result(batches)
    return future
