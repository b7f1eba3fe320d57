"""Writing several texts at once: token by token, with one key/value cache for rows of different lengths.

Rows stand right-aligned, so that the next token of all of them has one index in the cache:

    index      0 1 2 3 4 | 5
    row 0      . . a b c | x        . belongs to no text: a document of its own, which the text never sees
    row 1      a b c d e | y        positions count from each row's first token

A row's numbers are those of the text alone, whatever is written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalm.data.batch import Batch
from megalm.generate.sampling import Sampling, sample
from megalm.model.cache import keep_cache, select_rows
from megalm.model.transformer import Transformer
from megalm.parallel.collectives import all_gather

ROWS = 32
"""Texts written at once where nobody says: the weights are read once for all of them, and a CPU's caches still hold them."""


@dataclass
class Written:
    """What followed one prompt."""

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    """Of each token, by the whole model: without temperature, top-k and top-p."""
    reason: str = "length"
    """Why it ends: `stop` (a stop token, or the caller said so) or `length` (as many tokens as were asked for)."""


@dataclass
class _Row:
    """One text while it is written."""

    place: int
    text: list[int]
    sampling: Sampling
    written: Written
    generator: torch.Generator
    first: int = 0
    """Index in the text of the first token that the model still sees."""

    @property
    def seen(self) -> list[int]:
        return self.text[self.first :]

    def forget(self, window: int) -> None:
        """Where the text has outgrown the window: its older half is forgotten."""
        if len(self.text) - self.first > window:
            self.first = len(self.text) - (window - window // 2)


OnToken = Callable[[int, int], bool | None]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    *,
    stop: Collection[int] = (),
    never: Sequence[int] = (),
    on_token: OnToken | None = None,
    rows: int = ROWS,
) -> list[Written]:
    """Write on from each prompt (at least one token), up to its `max_tokens` or until one of `stop`, which is not included.

    sampling: one for all, or one for each prompt. A text depends on its own prompt and settings alone.
    never: tokens that are not written: those that pad the vocabulary and that no tokenizer can read back.
    on_token(which prompt, token) is told of each token as it comes; True ends that text with it.
    rows: most texts at once. When a text grows longer than the model's sequence, its older half is forgotten.

    The model is a whole one (embedding, all layers, output), on one pipeline stage and without sequence or context
    parallelism.
    Comm:    all-gather of the last position's logits over the tensor axis, beside the layers' own
    Errors:  ValueError for an empty prompt; ConfigError for settings that nothing can be drawn with
    """
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    for one in settings:
        one.check()
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate needs at least one token to go on from")
    if not (model.first and model.last) or model.sequence or model.context.size > 1:
        raise ValueError("generate needs a whole model, without pipeline, sequence and context parallelism")
    written = [Written() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # little padding
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a mask the layers keep may serve in training later
            for start in range(0, len(order), rows):
                batch = [
                    _Row(
                        i,
                        [int(token) for token in prompts[i]],
                        settings[i],
                        written[i],
                        torch.Generator().manual_seed(settings[i].seed),
                    )
                    for i in order[start : start + rows]
                ]
                _write(model, [row for row in batch if row.sampling.max_tokens > 0], frozenset(stop), never, on_token)
    finally:
        model.train(training)
    return written


def _write(
    model: Transformer, rows: list[_Row], stop: frozenset[int], never: Sequence[int], on_token: OnToken | None
) -> None:
    """Write these rows to their ends; the cache begins anew whenever one of them has filled the window."""
    window = model.config.seq_length
    there = range(model.config.vocab_size)
    unwritable = torch.tensor(sorted(token for token in set(never) if token in there), dtype=torch.int64)
    device = model.embedding.weight.device
    while rows:
        for row in rows:
            row.forget(window)
        with keep_cache(model, window):
            longest = max(len(row.seen) for row in rows)
            begin = torch.tensor([longest - len(row.seen) for row in rows], device=device)
            tokens = torch.tensor([[0] * (longest - len(row.seen)) + row.seen for row in rows], device=device)
            used = 0
            while True:
                logits = compute_next_logits(model, tokens, used, begin)
                used += tokens.shape[1]
                going = [i for i, row in enumerate(rows) if _take(row, logits[i].cpu(), unwritable, stop, on_token)]
                if len(going) < len(rows):
                    rows = [rows[i] for i in going]
                    kept = torch.tensor(going, dtype=torch.int64, device=device)
                    begin = begin[kept]
                    if rows:
                        select_rows(model, kept)
                if not rows or used == window:
                    break
                tokens = torch.tensor([[row.text[-1]] for row in rows], device=device)


def _take(row: _Row, logits: Tensor, unwritable: Tensor, stop: frozenset[int], on_token: OnToken | None) -> bool:
    """Draw the row's next token from logits fp32 [V]; returns whether more are to come."""
    settings, written = row.sampling, row.written
    choices = logits.index_fill(0, unwritable, -torch.inf)
    token = sample(choices, settings.temperature, settings.top_k, settings.top_p, row.generator)
    if token in stop:
        written.reason = "stop"
        return False
    row.text.append(token)
    written.tokens.append(token)
    written.log_probabilities.append(float(logits[token] - logits.logsumexp(0)))
    if on_token is not None and on_token(row.place, token):
        written.reason = "stop"
        return False
    return len(written.tokens) < settings.max_tokens


def compute_next_logits(model: Transformer, tokens: Tensor, position: int, begin: Tensor | None = None) -> Tensor:
    """Compute logits fp32 [B, V] of the token after `tokens` [B, S], whose first one stands at index `position` of the cache.

    begin [B]: the index that each row's text begins at; None: all at 0.
    """
    batch_size, length = tokens.shape
    indices = torch.arange(position, position + length, device=tokens.device).expand(batch_size, length)
    documents = None
    if begin is not None and bool((begin > 0).any()):
        indices = (indices - begin[:, None]).clamp_min(0)
        everything = torch.arange(position + length, device=tokens.device)
        documents = (everything >= begin[:, None]).to(torch.int32)
    batch = Batch(tokens=tokens, labels=tokens, positions=indices, document_ids=documents)
    hidden = model.run_layers(model.embed(batch), batch, seen=position)
    logits = all_gather(model.head.logits(hidden[-1:]), model.tensor, dim=-1)[0]
    return logits[:, : model.config.vocab_size].float()
