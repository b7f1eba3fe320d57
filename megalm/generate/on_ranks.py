"""Writing with a model in training, on its own ranks and layout, with its own weights.

Who writes what: the texts are dealt over data and context ranks, each of which writes its own. Tensor ranks compute every token
together; pipeline ranks one after another, and the last one draws it and tells the others:

    stage 0   a b c .       x .       y         rows stand right-aligned, as in megalm.generate.batch
    stage 1         a b c     x         y
    drawn               x       y         z

What a text is depends on its prompt, its key and the weights, and on nothing beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megalm.config import Config
from megalm.config.errors import ConfigError
from megalm.data.batch import Batch
from megalm.generate.draw import draw_numbers, draw_tokens
from megalm.generate.twin import make_twin
from megalm.model.cache import forget, keep_cache, select_rows
from megalm.model.transformer import Transformer
from megalm.parallel.collectives import all_gather, all_reduce, broadcast, hand_over
from megalm.parallel.mesh import Axis, Mesh
from megalm.pipeline.schedule import Placement
from megalm.precision.policy import DTYPES

KEPT = 0.75
"""Share of rows still being written below which the others leave the cache: leaving copies it, staying computes them."""


@dataclass
class Completion:
    """What was written after a prompt: with the token that ended it, which is learned, too."""

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    """Of each token where it was drawn, by the distribution that it was drawn from."""
    entropies: list[float] = field(default_factory=list)
    """Of that distribution, nats."""
    ended: bool = False
    """It ends by a stop token, and was not cut."""


@dataclass(frozen=True)
class Request:
    """A prompt, the keys of the texts that are to follow it, and how many tokens each may have."""

    prompt: Sequence[int]
    keys: Sequence[int]
    max_tokens: int


class RankWriter:
    """Writes with the chunks of a run on this rank; all ranks of a data and context rank call alike.

    Memory: one key/value cache of `rows` texts; no weight of its own.
    """

    def __init__(
        self, chunks: Sequence[Transformer], placement: Placement, config: Config, mesh: Mesh, *, rows: int = 64
    ) -> None:
        self.twins = [make_twin(chunk, config, mesh) for chunk in chunks]
        self.placement, self.mesh, self.rows = placement, mesh, rows
        self.hidden_size, self.dtype = config.model.hidden_size, DTYPES[config.precision.dtype]
        self.vocab_size, self.window = config.model.vocab_size, config.model.seq_length
        self.last_rank = placement.rank(placement.stages - 1)
        # Ranks that share experts take part in each other's passes: all of them run as many.
        outside = mesh.expert_block.size > mesh.tensor.size or mesh.expert_block.ranks != mesh.tensor.ranks
        self.together = mesh.expert_block if config.model.moe.num_experts and outside else Axis("expert_block")

    def write(self, requests: Sequence[Request], stop: Collection[int], temperature: float) -> list[list[Completion]]:
        """Write a completion for each key of each request, up to a token of `stop`. Log-probabilities and entropies are those of
        the last pipeline stage; others give none.

        Comm:   the layers'; for each token an all-gather of logits [N, V] over the tensor axis, between stages hidden states
                [N, H], over the pipeline axis tokens [N]; with experts on several ranks one number over their axis
        Errors: ConfigError where the model's weights are no good
        """
        found = [[Completion() for _ in request.keys] for request in requests]
        texts = [(r, k) for r, request in enumerate(requests) for k in range(len(request.keys))]
        texts.sort(key=lambda text: (len(requests[text[0]].prompt), text))
        parts = [texts[at : at + self.rows] for at in range(0, len(texts), self.rows)]
        rounds = self._agree(len(parts))
        with torch.no_grad():
            for number in range(rounds):
                part = parts[number] if number < len(parts) else []
                _Round(self, [_Text(requests[r], k, found[r][k]) for r, k in part]).run(frozenset(stop), temperature)
        return found

    def _agree(self, count: int) -> int:
        """The largest of the ranks that must run as many passes."""
        if self.together.size == 1:
            return count
        value = torch.tensor(float(count), device=self.mesh.device)
        return int(all_reduce(value, self.together, "max"))

    def compute_logits(self, tokens: Tensor, seen: int, begin: Tensor) -> Tensor | None:
        """Logits fp32 [N, V] of the token after `tokens` [N, S], at index `seen` of the cache; None but on the last stage."""
        count, length = tokens.shape
        device = tokens.device
        everything = torch.arange(seen + length, device=device)
        positions = (everything[seen:] - begin[:, None]).clamp(0, self.window - 1)  # beyond it are texts that are done
        documents = (everything >= begin[:, None]).to(torch.int32) if bool((begin > 0).any()) else None
        batch = Batch(tokens=tokens, labels=tokens, positions=positions, document_ids=documents)
        axis = self.mesh.pipeline
        hidden: Tensor | None = None
        for stage in range(self.placement.stages):
            owner = self.placement.rank(stage)
            before = self.placement.rank(stage - 1) if stage else owner
            if before != owner and axis.rank in (before, owner):
                if hidden is None:
                    hidden = torch.empty(length, count, self.hidden_size, dtype=self.dtype, device=device)
                hidden = hand_over(hidden, axis, before, owner)
            if axis.rank == owner:
                twin = self.twins[self.placement.chunk(stage)]
                entering = twin.embed(batch) if stage == 0 else hidden
                assert entering is not None
                hidden = twin.run_layers(entering, batch, seen=seen)
            elif axis.rank != before:
                hidden = None
        if axis.rank != self.last_rank or hidden is None:
            return None
        twin = self.twins[self.placement.chunk(self.placement.stages - 1)]
        logits = all_gather(twin.head.logits(hidden[-1:]), self.mesh.tensor, dim=-1)[0]
        return logits[:, : self.vocab_size].float()


@dataclass
class _Text:
    request: Request
    number: int
    completion: Completion

    @property
    def key(self) -> int:
        return self.request.keys[self.number]


class _Round:
    """Texts that are written together, from their prompts to the end of the last of them."""

    def __init__(self, writer: RankWriter, texts: list[_Text]) -> None:
        self.writer, self.texts = writer, texts
        self.device = writer.mesh.device

    def run(self, stop: frozenset[int], temperature: float) -> None:
        writer, texts = self.writer, self.texts
        prompts = [text.request.prompt for text in texts] or [[0]]
        distinct: dict[int, int] = {}  # the same list of ids is read once
        rows = [distinct.setdefault(id(prompt), len(distinct)) for prompt in prompts]
        kept = {number: prompts[rows.index(number)] for number in range(len(distinct))}
        longest = max(map(len, prompts))
        limit = max([text.request.max_tokens for text in texts] or [1])
        begin = torch.tensor([longest - len(kept[n]) for n in range(len(kept))], device=self.device)
        tokens = torch.tensor(
            [[0] * (longest - len(kept[n])) + list(kept[n]) for n in range(len(kept))], device=self.device
        )
        keys = np.array([text.key for text in texts] or [0], np.uint64)
        alive = np.ones(len(texts), bool)
        used, place = 0, 0
        with ExitStack() as caches:
            for twin in writer.twins:
                caches.enter_context(keep_cache(twin, longest + limit))
            while True:
                logits = writer.compute_logits(tokens, used, begin)
                used += tokens.shape[1]
                if not place:
                    spread = torch.tensor(rows, device=self.device)
                    begin = begin[spread]
                    for twin in writer.twins:
                        select_rows(twin, spread)
                    logits = None if logits is None else logits[spread]
                drawn, scores, entropies = self._draw(logits, draw_numbers(keys, place), temperature)
                place += 1
                for row in np.flatnonzero(alive):
                    alive[row] = _take(texts[row], int(drawn[row]), scores, entropies, int(row), stop)
                if not writer._agree(int(alive.any())):
                    break
                if texts and alive.any() and alive.mean() < KEPT:
                    going = np.flatnonzero(alive)
                    texts, keys, drawn, alive = [texts[i] for i in going], keys[going], drawn[going], alive[going]
                    picked = torch.from_numpy(going).to(self.device)
                    begin = begin[picked]
                    for twin in writer.twins:
                        select_rows(twin, picked)
                if used >= longest + limit:  # only others go on
                    used, begin, drawn = self._start_again(len(drawn))
                tokens = torch.from_numpy(drawn)[:, None].to(self.device)

    def _draw(
        self, logits: Tensor | None, numbers: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Draw the next token of each text on every stage, with log-probability and entropy on the last."""
        axis, scores, entropies = self.writer.mesh.pipeline, None, None
        if logits is not None:
            try:
                tokens, found, spread = draw_tokens(logits, numbers, temperature)
            except ValueError:
                tokens = torch.full((len(numbers),), -1, device=self.device)
            else:
                scores, entropies = found.cpu().numpy(), spread.cpu().numpy()
        else:
            tokens = torch.empty(len(numbers), dtype=torch.int64, device=self.device)
        drawn = broadcast(tokens, axis, self.writer.last_rank).cpu().numpy()
        if (drawn < 0).any():
            raise ConfigError(
                "the model's logits are not finite: its weights are damaged, and nothing can be written with it"
            )
        return drawn, scores, entropies

    def _start_again(self, count: int) -> tuple[int, Tensor, np.ndarray]:
        """This rank's texts are done, and its part in others' experts is not: it goes on with an empty cache."""
        for twin in self.writer.twins:
            forget(twin)
        return 0, torch.zeros(count, dtype=torch.int64, device=self.device), np.zeros(count, np.int64)


def _take(
    text: _Text, token: int, scores: np.ndarray | None, entropies: np.ndarray | None, row: int, stop: frozenset[int]
) -> bool:
    """Add a token to its text; whether more are to come."""
    completion = text.completion
    completion.tokens.append(token)
    if scores is not None and entropies is not None:
        completion.log_probabilities.append(float(scores[row]))
        completion.entropies.append(float(entropies[row]))
    completion.ended = token in stop
    return not completion.ended and len(completion.tokens) < text.request.max_tokens
