"""What a model writes, judged: by the answers that count, or by the rules of its request. One marker for each kind of task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megalm.evaluate.answers import match_answer
from megalm.evaluate.instructions import check_instructions, follow_instructions
from megalm.evaluate.item import Item, Task


@dataclass(frozen=True)
class Mark:
    """What one text is worth."""

    values: dict[str, float]
    """Its part in each figure."""
    note: str = ""
    """What was wrong with it, for who reads the results."""


class Marker(Protocol):
    """Judges the texts of one kind of task."""

    def check(self, task: Task) -> None:
        """Before a model is asked. Errors: ConfigError for what cannot be judged here"""

    def mark(self, items: Sequence[Item], texts: Sequence[str], task: Task) -> list[Mark]:
        """The texts written for these items."""


class Answers:
    """`generate`: what is written against the answers that count."""

    def check(self, task: Task) -> None:
        """Nothing is needed."""

    def mark(self, items: Sequence[Item], texts: Sequence[str], task: Task) -> list[Mark]:
        pairs = zip(items, texts, strict=True)
        return [Mark(match_answer(text, item.continuations, task.compare)) for item, text in pairs]


class Instructions:
    """`instruct`: whether the rules that the request names were followed."""

    def check(self, task: Task) -> None:
        check_instructions(task)

    def mark(self, items: Sequence[Item], texts: Sequence[str], task: Task) -> list[Mark]:
        found = [follow_instructions(item, text) for item, text in zip(items, texts, strict=True)]
        return [Mark(one.values, "" if not one.broken else "not followed: " + ", ".join(one.broken)) for one in found]


MARKERS: dict[str, Marker] = {"generate": Answers(), "instruct": Instructions()}
"""Kind of a task whose model writes -> who judges."""
