"""Log-probabilities of requests, on any layout, with the weights as they stand.

Requests are sorted by length, so that little is padded, and padded on the right, which no causal token sees. Equal requests
are computed once, so that equal choices have equal scores. What is computed is the head's own log-probabilities in fp32, only
where a token is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megalm.data.batch import Batch
from megalm.evaluate.request import Request, Score
from megalm.model.head import Head
from megalm.model.transformer import Transformer
from megalm.objectives.objective import Objective, Outcome
from megalm.parallel.collectives import all_reduce
from megalm.parallel.context import shard_batch
from megalm.parallel.mesh import Mesh
from megalm.pipeline.execute import Executor
from megalm.pipeline.schedule import build_schedule

TOKENS = 8192
"""Tokens of one forward pass: a CPU's products are at full speed from about 2,000, and activations stay small."""
LOGITS = 2**26
"""Most logits held at once, in numbers: 256 MiB in fp32."""


class LabelScores(Objective):
    """Of each row the sum of its scored labels' log-probabilities, and how many of them are the likeliest token.

    Shapes: reports fp64 [B] each, this context rank's share
    """

    sums = {"log_probability": 1, "likeliest": 1}

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        assert batch.loss_mask is not None
        labels, mask = batch.labels.t(), batch.loss_mask.t()
        rows = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
        share = head.weight.shape[0]
        if head.sequence:  # the head gathers the sequence: all positions together
            scores, likeliest = head.score_labels(hidden, labels)
            rows, values = rows.flatten(), (scores * mask).flatten()
            matches = (likeliest * mask).flatten()
        else:
            places = mask.flatten().nonzero().squeeze(-1)
            picked, wanted = hidden.flatten(0, 1)[places, None], labels.flatten()[places, None]
            chunk = max(1, LOGITS // share)
            found = [head.score_labels(*each) for each in zip(picked.split(chunk), wanted.split(chunk), strict=True)]
            rows = rows.flatten()[places]
            values = torch.cat([scores.flatten() for scores, _ in found])
            matches = torch.cat([likeliest.flatten() for _, likeliest in found]).float()
        zero = torch.zeros(labels.shape[1], dtype=torch.float64, device=labels.device)
        sums = {"log_probability": zero.index_add(0, rows, values.double())}
        sums["likeliest"] = zero.index_add(0, rows, matches.double())
        return Outcome(zero.sum(), sums)


class Scorer:
    """Scores requests with the model of an executor's chunks; every rank calls alike and gets all scores.

    Args:
        executor: of the model's chunks on this rank; it may be a training run's.
        length: most tokens that the model reads.
        tokens: of one forward pass of one data rank, where no pipeline fixes its rows.
        multiple: what a rank's positions of a sequence must be a multiple of (fp8 products).
    """

    def __init__(self, executor: Executor, mesh: Mesh, length: int, *, tokens: int = TOKENS, multiple: int = 1) -> None:
        self.executor, self.mesh, self.length, self.tokens = executor, mesh, length, tokens
        self.sequence = bool(executor.chunks[0].sequence)
        context, tensor = mesh.context.size, mesh.tensor.size if self.sequence else 1
        self.multiple = math.lcm((2 * context if context > 1 else 1) * tensor, multiple * context)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """The score of each request, in order.

        Comm: the forward passes', then one all-reduce of two numbers a request over the world
        """
        different = list(dict.fromkeys(requests))
        order = sorted(range(len(different)), key=lambda i: (-len(different[i].ids), different[i].ids))
        totals = torch.zeros(len(different), 2, dtype=torch.float64, device=self.mesh.device)
        with self._in_evaluation():
            for numbers in self._batches([len(different[i].ids) - 1 for i in order]):
                self._run(different, [order[place] for place in numbers], totals)
        totals = all_reduce(totals / self.mesh.tensor.size, self.mesh.world).cpu()
        scores = {
            request: Score(float(total[0]), request.count, round(float(total[1])) == request.count)
            for request, total in zip(different, totals, strict=True)
        }
        return [scores[request] for request in requests]

    def _batches(self, lengths: Sequence[int]) -> Iterator[range]:
        """Places of what one forward pass of all data ranks takes. lengths: descending."""
        start = 0
        while start < len(lengths):
            end = min(start + self._rows(lengths[start]) * self._together, len(lengths))
            yield range(start, end)
            start = end

    @property
    def _together(self) -> int:
        """Micro-batches in flight, over data ranks: a pipeline is filled."""
        return self.mesh.data.size * self.executor.schedule.placement.ranks

    def _rows(self, length: int) -> int:
        """Rows of a micro-batch: between pipeline stages tensors of the run's own size travel."""
        if self.executor.schedule.placement.stages > 1:
            return self.executor.shape[1]
        return max(1, self.tokens // self._padded(length))

    def _padded(self, length: int) -> int:
        return max(1, -(-length // self.multiple)) * self.multiple

    def _run(self, requests: Sequence[Request], numbers: Sequence[int], totals: Tensor) -> None:
        length = self._padded(len(requests[numbers[0]].ids) - 1)
        fixed = self.executor.schedule.placement.stages > 1
        rows = self._rows(length) if fixed else -(-len(numbers) // self._together)
        local = length // self.mesh.context.size // (self.mesh.tensor.size if self.sequence else 1)
        self.executor.set_seq_length(local)
        pipeline = self.executor.schedule.placement.ranks
        begin = self.mesh.data.rank * pipeline * rows
        own = [numbers[begin + m * rows : begin + (m + 1) * rows] for m in range(pipeline)]
        batches = [self._make_batch([requests[i] for i in part], rows, length) for part in own]
        reports = self.executor.evaluate(batches, LabelScores())
        for part, report in zip(own, reports, strict=True):
            if part and "log_probability" in report:
                found = torch.stack([report["log_probability"], report["likeliest"]], 1)[: len(part)]
                totals[torch.tensor(part, device=totals.device)] += found

    def _make_batch(self, requests: Sequence[Request], rows: int, length: int) -> Batch:
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        labels, mask = torch.zeros_like(tokens), torch.zeros(rows, length)
        for row, request in enumerate(requests):
            end = len(request.ids) - 1
            ids = torch.tensor(request.ids)
            tokens[row, :end], labels[row, :end] = ids[:-1], ids[1:]
            mask[row, end - request.count : end] = 1.0
        batch = Batch(tokens=tokens, labels=labels, loss_mask=mask).to(self.mesh.device)
        return shard_batch(batch, self.mesh.context)

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        before = self.executor.shape
        modes = [chunk.training for chunk in self.executor.chunks]
        for chunk in self.executor.chunks:
            chunk.eval()
        try:
            yield
        finally:
            self.executor.shape = before
            for chunk, training in zip(self.executor.chunks, modes, strict=True):
                chunk.train(training)


def make_executor(model: Transformer, mesh: Mesh) -> Executor:
    """Make an executor of a whole model in one process."""
    weight = model.embedding.weight
    return Executor(
        [model],
        build_schedule("1f1b", 1, 1, 1),
        mesh.pipeline,
        micro_batch_size=1,
        seq_length=model.config.seq_length,
        hidden_size=model.config.hidden_size,
        dtype=weight.dtype,
        device=weight.device,
    )
