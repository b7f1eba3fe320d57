"""What a model writes, judged: by the answers that count, by the rules of its request, by the tests of its program.

One marker for each kind of task.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from megalm.config.errors import ConfigError
from megalm.evaluate.answers import match_answer
from megalm.evaluate.instructions import check_instructions, follow_instructions
from megalm.evaluate.item import Item, Task
from megalm.evaluate.sandbox import run_program


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


class Code:
    """`code`: whether the program passes its tests, run shut in."""

    def check(self, task: Task) -> None:
        run_program("")

    def mark(self, items: Sequence[Item], texts: Sequence[str], task: Task) -> list[Mark]:
        programs = [complete_program(item, text) for item, text in zip(items, texts, strict=True)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return [Mark({"passed": float(ran.passed)}, ran.note) for ran in pool.map(run_program, programs)]


class Unrun:
    """`code` where nobody asked for it to be run."""

    def check(self, task: Task) -> None:
        raise ConfigError(
            f"{task.name}: it runs the programs that the model writes (shut in: no network, no files, limits): say --run-code, "
            "or leave the task out"
        )

    def mark(self, items: Sequence[Item], texts: Sequence[str], task: Task) -> list[Mark]:
        raise AssertionError("`check` refuses the task first")


MARKERS: dict[str, Marker] = {"generate": Answers(), "instruct": Instructions(), "code": Unrun()}
"""Kind of a task whose model writes -> who judges."""
FENCED = re.compile(r"```(?:\w*)\n(.*?)(?:```|\Z)", re.DOTALL)


def complete_program(item: Item, text: str) -> str:
    """The program to test: the prompt, what was written, the tests. Of an answer that talks, the first fenced block that there
    is; where that defines the function itself, only what stands before the function in the prompt (imports, helpers) is kept.
    """
    prompt, name = item.contexts[0], str(item.source.get("entry_point", ""))
    fenced = FENCED.search(text)
    code = fenced.group(1) if fenced else text
    if name and re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE):
        prompt = (
            prompt[: at.start()] if (at := re.search(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE)) else prompt
        )
    return f"{prompt}{code}\n{item.continuations[0]}"
