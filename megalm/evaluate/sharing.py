"""Scoring with what requests begin alike computed once: a question's tokens are read once for all of its choices.

    prefix rows, right-aligned       . . a b c        then for each choice, with the row's keys and values:   c x y
                                     d e f g h                                                                c z
                                                                                                              h u v w
For a whole model in one process; on a layout `megalm.evaluate.scoring` reads each request whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.data.batch import Batch
from megalm.evaluate.request import Request, Score
from megalm.evaluate.scoring import TOKENS, LabelScores, Scorer, make_executor
from megalm.model.cache import keep_cache, select_rows
from megalm.model.transformer import Transformer
from megalm.parallel.mesh import Mesh

WORTH = 1.25
"""Times the tokens that reading each request whole takes, from which sharing is worth its second pass and its mask."""


@dataclass(frozen=True)
class _Group:
    """Requests that begin with the same `prefix`, none of whose tokens is scored or predicts one that is."""

    prefix: tuple[int, ...]
    numbers: list[int]


class SharingScorer(Scorer):
    """A scorer of one whole model."""

    def __init__(self, model: Transformer, *, tokens: int = TOKENS) -> None:
        mesh = Mesh.single(model.embedding.weight.device)
        super().__init__(make_executor(model, mesh), mesh, model.config.seq_length, tokens=tokens)
        self.model = model

    def score(self, requests: Sequence[Request]) -> list[Score]:
        different = list(dict.fromkeys(requests))
        groups = find_groups(different)
        shared = {number for group in groups for number in group.numbers}
        rest = [number for number in range(len(different)) if number not in shared]
        scores = dict(zip(rest, super().score([different[n] for n in rest]), strict=True)) if rest else {}
        with self._in_evaluation():
            for batch in self._group_batches(different, groups):
                scores.update(self._score_groups(different, batch))
        found = {request: scores[number] for number, request in enumerate(different)}
        return [found[request] for request in requests]

    def _group_batches(self, requests: Sequence[Request], groups: Sequence[_Group]) -> list[list[_Group]]:
        """Groups that are read together: neither pass has more than `tokens` tokens, where one group alone has not."""
        batches: list[list[_Group]] = []
        rows, longest = 0, 0
        for group in sorted(groups, key=lambda group: -len(group.prefix)):
            suffix = max(len(requests[n].ids) for n in group.numbers) - 1 - len(group.prefix)
            rows, longest = rows + len(group.numbers), max(longest, suffix)
            room = batches and (len(batches[-1]) + 1) * len(batches[-1][0].prefix) <= self.tokens
            if room and rows * longest <= self.tokens:
                batches[-1].append(group)
            else:
                batches.append([group])
                rows, longest = len(group.numbers), suffix
        return batches

    @torch.no_grad()
    def _score_groups(self, requests: Sequence[Request], groups: Sequence[_Group]) -> dict[int, Score]:
        device = self.mesh.device
        longest = max(len(group.prefix) for group in groups)
        numbers = [n for group in groups for n in group.numbers]
        rows = torch.tensor([row for row, group in enumerate(groups) for _ in group.numbers], device=device)
        begin = torch.tensor([longest - len(group.prefix) for group in groups], device=device)
        prefixes = torch.zeros(len(groups), longest, dtype=torch.int64)
        for row, group in enumerate(groups):
            prefixes[row, longest - len(group.prefix) :] = torch.tensor(group.prefix)
        rest = [requests[n].ids[len(groups[int(row)].prefix) :] for n, row in zip(numbers, rows.tolist(), strict=True)]
        size = max(map(len, rest)) - 1
        tokens = torch.zeros(len(rest), size, dtype=torch.int64)
        labels, mask = torch.zeros_like(tokens), torch.zeros(len(rest), size)
        for row, (number, ids) in enumerate(zip(numbers, rest, strict=True)):
            end = len(ids) - 1
            tokens[row, :end], labels[row, :end] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
            mask[row, end - requests[number].count : end] = 1.0
        with keep_cache(self.model, longest + size):
            self._read(Batch(tokens=prefixes, labels=prefixes).to(device), begin, 0)
            select_rows(self.model, rows)
            batch = Batch(tokens=tokens, labels=labels, loss_mask=mask).to(device)
            hidden = self._read(batch, begin[rows], longest)
        sums = LabelScores()(self.model.head, hidden, batch).sums
        return {
            number: Score(float(total), requests[number].count, round(float(hits)) == requests[number].count)
            for number, total, hits in zip(
                numbers, sums["log_probability"].cpu(), sums["likeliest"].cpu(), strict=True
            )
        }  # fmt: skip

    def _read(self, batch: Batch, begin: Tensor, seen: int) -> Tensor:
        """Read the hidden states of tokens at indices from `seen` on, in rows whose texts begin at `begin`."""
        length = batch.tokens.shape[1]
        everything = torch.arange(seen + length, device=begin.device)
        positions = (everything[seen:] - begin[:, None]).clamp(0, self.length - 1)  # beyond it is padding alone
        documents = (everything >= begin[:, None]).to(torch.int32) if bool((begin > 0).any()) else None
        placed = Batch(tokens=batch.tokens, labels=batch.labels, positions=positions, document_ids=documents)
        return self.model.run_layers(self.model.embed(placed), placed, seen=seen)


def find_groups(requests: Sequence[Request]) -> list[_Group]:
    """Neighbours that are worth reading together: a choice's requests follow each other."""
    groups: list[_Group] = []
    at = 0
    while at < len(requests):
        numbers = [at]
        prefix = _free(requests[at])
        while at + len(numbers) < len(requests):
            other = _free(requests[at + len(numbers)])
            same = _common(prefix, other)
            if 2 * same < max(len(prefix), len(other)) or same < 2:
                break
            numbers.append(at + len(numbers))
            prefix = prefix[:same]
        whole = sum(len(requests[n].ids) - 1 for n in numbers)
        apart = whole - (len(numbers) - 1) * len(prefix)
        if len(numbers) > 1 and whole >= WORTH * apart:
            groups.append(_Group(prefix, numbers))
        at += len(numbers)
    return groups


def _free(request: Request) -> tuple[int, ...]:
    """The ids before the one that predicts the first scored token."""
    return request.ids[: len(request.ids) - request.count - 1]


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    if first == second:
        return len(first)
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
