"""One question of a task, whatever file it came from, and the task that it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    "choice": "one context, several continuations",
    "schema": "several contexts, one continuation",
    "cloze": "one context, one continuation",
    "text": "a whole text, every token of it",
    "generate": "a context, and answers that what is written is compared with",
    "instruct": "a request, and rules that what is written must follow",
    "code": "the beginning of a program, and tests that it must pass",
}
"""Kinds of items, and what is scored of each."""
WRITTEN = frozenset({"generate", "instruct", "code"})
"""Kinds for which a model writes; `megalm.evaluate.written` judges them."""


@dataclass(frozen=True)
class Item:
    """A question: what stands before, what is scored, and which of it is right."""

    kind: str
    contexts: tuple[str, ...]
    """One; of a schema several. Of a text none."""
    continuations: tuple[str, ...]
    """The choices; of a schema, cloze or text one. What is generated: the answers that count, the first for few-shot;
    of a request its rules, of a program its tests."""
    gold: tuple[int, ...] = (0,)
    """Numbers of the right choices or contexts."""
    source: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """The row as the file has it."""
    shown: str = ""
    """The answer as an example shows it, where that is longer than the answer (a chain of thought); "": as it is."""

    @property
    def options(self) -> tuple[str, ...]:
        """What is chosen from: the continuations, of a schema the contexts."""
        return self.contexts if self.kind == "schema" else self.continuations

    def as_shot(self, delimiter: str) -> str:
        """The item with its right answer, as an example before another one."""
        gold = self.gold[0]
        context = self.contexts[gold if self.kind == "schema" else 0]
        return context + delimiter + (self.shown or self.continuations[gold if self.kind == "choice" else 0])


@dataclass(frozen=True)
class Task:
    """Items that are asked alike, and how they are put to a model."""

    name: str
    kind: str
    items: tuple[Item, ...]
    num_fewshot: int = 0
    """Examples before each item."""
    shots: tuple[Item, ...] | None = None
    """Where the examples are taken from; None: the other items."""
    sampler: str = "default"
    """How lm_eval takes them: `default` at random, `first_n` from the beginning."""
    description: str = ""
    """Text before everything."""
    prelimiter: str = ""
    """Text before each question."""
    delimiter: str = " "
    """Between a context and what follows it."""
    example_delimiter: str | None = None
    """Between examples; None: the protocol's own."""
    bare_target: bool = False
    """lm-eval's `loglikelihood`: the continuation brings its own blank, the delimiter stands in examples alone."""
    stop: tuple[str, ...] = ()
    """What is generated ends before the first of these."""
    max_tokens: int = 64
    """Most tokens to generate."""
    chat: bool = False
    """Asked as a conversation, by the model's template; examples are its earlier turns."""
    compare: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """How what is generated is compared with the answers: see `megalm.evaluate.answers`."""
    chance: float | None = None
    """Accuracy of guessing; None: one in as many as there are choices."""
    category: str = ""
    """Where a suite averages by categories."""
    part_of: str = ""
    """The task that it is one category of: parts are averaged to that task's figure first."""
    version: str = ""

    def baseline(self) -> float:
        """Accuracy that needs no model: the one that is claimed, else the mean of one in so many choices."""
        if self.chance is not None:
            return self.chance
        if self.kind not in ("choice", "schema") or not self.items:
            return 0.0
        return sum(len(item.gold) / len(item.options) for item in self.items) / len(self.items)

    def digest(self) -> str:
        """sha256 of the items and of the examples' pool: changes when a word of the data does."""
        rows = [_row(item) for item in (*self.items, *(self.shots or ()))]
        return hashlib.sha256(json.dumps([self.kind, rows], ensure_ascii=False).encode()).hexdigest()


def _row(item: Item) -> Sequence[object]:
    return [item.contexts, item.continuations, item.gold, *([item.shown] if item.shown else [])]
