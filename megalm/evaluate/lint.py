"""What is wrong with a test's items, before a model is judged by them."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.evaluate.item import WRITTEN, Item, Task
from megalm.evaluate.tasks.rows import guess_kind, make_item, read_rows
from megalm.evaluate.tasks.suite import DEFAULTS

DEVIATIONS = 3.0
"""Standard errors above chance from which a preference is told: one clean check in 700 is then called biased."""
SHORT = 4
"""Characters below which an answer is found inside many prompts by accident."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where."""

    check: str
    text: str
    items: tuple[int, ...] = ()
    """Numbers of the items, from 1; none where it is about all."""

    def as_dict(self) -> dict[str, Any]:
        return {"check": self.check, "text": self.text, "count": len(self.items), "items": list(self.items)}


@dataclass
class Linted:
    """A file's items and what was found."""

    name: str
    kind: str
    items: list[Item]
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        found = [finding.as_dict() for finding in self.findings]
        return {"task": self.name, "kind": self.kind, "items": len(self.items), "findings": found}


def lint_file(path: Path) -> Linted:
    """Read a jsonl file leniently: an item that is broken is a finding, the others are checked.

    Errors: ConfigError where no line is an item at all
    """
    rows = list(read_rows(path))
    kinds = Counter(kind for _, row in rows if (kind := guess_kind(row)))
    if not kinds:
        raise ConfigError(f"{path}: no line has choices, context_options, continuation, answer or text")
    kind = kinds.most_common(1)[0][0]
    items: list[Item] = []
    broken: list[tuple[int, str]] = []
    for where, row in rows:
        try:
            items.append(make_item(row, kind, where))
        except ConfigError as error:
            broken.append((len(items) + len(broken) + 1, str(error)))
    findings = [Finding("broken item", text, (number,)) for number, text in broken]
    task = Task(path.stem, kind, tuple(items), **DEFAULTS.get(kind, {}))
    return Linted(task.name, kind, items, findings + lint_task(task))


def lint_task(task: Task) -> list[Finding]:
    """All checks of a task."""
    return [finding for check in CHECKS for finding in check(task)]


def _gold(item: Item) -> str:
    return item.options[item.gold[0]] if item.kind in ("choice", "schema") else item.continuations[0]


def _prompt(item: Item) -> str:
    context = item.contexts if item.kind == "schema" else item.contexts[:1]
    return " ".join("\n".join((*context, *(item.continuations if item.kind in ("schema", "text") else ()))).split())


def _biased(hits: int, count: int, chance: float) -> bool:
    error = math.sqrt(chance * (1 - chance) / count) if count else math.inf
    return count > 0 and hits / count > chance + DEVIATIONS * error


def _check_majority(task: Task) -> Iterator[Finding]:
    """One answer, always given, beats the chance that is claimed."""
    if task.kind != "choice" or not task.items:
        return
    answer, hits = Counter(_gold(item).strip().lower() for item in task.items).most_common(1)[0]
    count, chance = len(task.items), task.baseline()
    if _biased(hits, count, chance):
        yield Finding(
            "majority answer",
            f"always {answer!r} is right {hits / count:.1%} of the time, chance is taken for {chance:.1%}",
        )


def _check_position(task: Task) -> Iterator[Finding]:
    """The right answer stands at one place more often than it should."""
    if task.kind not in ("choice", "schema") or not task.items:
        return
    place, hits = Counter(item.gold[0] for item in task.items).most_common(1)[0]
    count = len(task.items)
    chance = sum(1 / len(item.options) for item in task.items) / count
    if _biased(hits, count, chance):
        tied = f"; a model with equal scores takes the first and gets {hits / count:.0%}" if place == 0 else ""
        yield Finding(
            "answer position",
            f"the right answer is number {place + 1} in {hits} of {count} (chance {chance:.0%}){tied}",
        )


def _check_equal_choices(task: Task) -> Iterator[Finding]:
    found = [
        number
        for number, item in enumerate(task.items, 1)
        if item.kind in ("choice", "schema") and len({" ".join(o.split()) for o in item.options}) < len(item.options)
    ]
    if found:
        yield Finding("equal choices", f"{len(found)} of {len(task.items)} items have a choice twice", tuple(found))


def _check_repeated(task: Task) -> Iterator[Finding]:
    """The same prompt: with another right answer, or the same one."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(task.items, 1):
        groups[_prompt(item)].append(number)
    again: list[int] = []
    other: list[int] = []
    for numbers in groups.values():
        if len(numbers) > 1:
            answers = {_gold(task.items[number - 1]).strip() for number in numbers}
            (other if len(answers) > 1 and task.kind not in ("schema", "text") else again).extend(numbers)
    prompts = len({_prompt(task.items[n - 1]) for n in other})
    if other:
        yield Finding(
            "same prompt, other answer", f"{prompts} prompts have more than one right answer", tuple(sorted(other))
        )
    copies = len(again) - len({_prompt(task.items[n - 1]) for n in again})
    if again:
        yield Finding("repeated prompts", f"{copies} items repeat an earlier one's prompt", tuple(sorted(again)))


def _check_longest(task: Task) -> Iterator[Finding]:
    """Whoever takes the longest choice is right more often than chance."""
    hits, count, chance = 0, 0, 0.0
    for item in task.items:
        lengths = [len(option) for option in item.continuations]
        if item.kind == "choice" and lengths.count(max(lengths)) == 1:
            count, chance = count + 1, chance + 1 / len(lengths)
            hits += lengths.index(max(lengths)) in item.gold
    if count and _biased(hits, count, chance / count):
        yield Finding(
            "longest choice",
            f"the longest choice is right in {hits / count:.0%} of {count} (chance {chance / count:.0%})",
        )


def _check_chance(task: Task) -> Iterator[Finding]:
    """The chance that a suite or readme claims is not that of the choices in the file."""
    if task.chance is None or task.kind not in ("choice", "schema") or not task.items:
        return
    own = sum(len(item.gold) / len(item.options) for item in task.items) / len(task.items)
    if abs(own - task.chance) > 0.01:
        yield Finding("claimed chance", f"{task.chance:.1%} is claimed, the file's choices make {own:.1%}")


def _check_empty(task: Task) -> Iterator[Finding]:
    def is_empty(item: Item) -> bool:
        texts = item.continuations if item.kind == "schema" else (*item.contexts, *item.continuations)
        return not all(text.strip() for text in texts)

    found = tuple(number for number, item in enumerate(task.items, 1) if is_empty(item))
    if found:
        yield Finding("empty text", f"{len(found)} items have an empty prompt, choice or answer", found)


def _check_inside(task: Task) -> Iterator[Finding]:
    """The right choice stands in the prompt, and no wrong one does."""
    found = []
    for number, item in enumerate(task.items, 1):
        if item.kind != "choice":
            continue
        inside = [_stands_in(choice, item.contexts[0]) for choice in item.continuations]
        if inside[item.gold[0]] and sum(inside) == 1:
            found.append(number)
    if found:
        yield Finding(
            "answer in the prompt", f"{len(found)} prompts hold their right answer and no wrong one", tuple(found)
        )


def _stands_in(answer: str, prompt: str) -> bool:
    answer = answer.strip().lower().rstrip(".")
    return len(answer) >= SHORT and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt.lower()) is not None


def _check_shots(task: Task) -> Iterator[Finding]:
    prompts = {_prompt(shot) for shot in task.shots or ()}
    found = tuple(number for number, item in enumerate(task.items, 1) if _prompt(item) in prompts)
    if found:
        yield Finding("example is the item", f"{len(found)} items are among the examples before them", found)


def _check_stop(task: Task) -> Iterator[Finding]:
    found = tuple(
        number
        for number, item in enumerate(task.items, 1)
        if item.kind == "generate" and any(stop in answer for stop in task.stop for answer in item.continuations)
    )
    if found:
        yield Finding("stop in the answer", f"{len(found)} answers hold a text that ends what is written", found)


def _check_blanks(task: Task) -> Iterator[Finding]:
    """Some choices begin with a blank and others do not: the tokens, and so the scores, are of two kinds."""
    found = tuple(
        number
        for number, item in enumerate(task.items, 1)
        if item.kind == "choice" and len({choice[:1].isspace() for choice in item.continuations}) > 1
    )
    if found:
        yield Finding("uneven blanks", f"{len(found)} items have choices with and without a blank before them", found)


CHECKS: Sequence[Callable[[Task], Iterator[Finding]]] = (
    _check_majority,
    _check_position,
    _check_equal_choices,
    _check_repeated,
    _check_longest,
    _check_chance,
    _check_empty,
    _check_inside,
    _check_shots,
    _check_stop,
    _check_blanks,
)


def describe_item(item: Item) -> str:
    """Describe an item to be read: its prompt, its choices, the right one marked."""
    lines: list[str] = []
    if item.kind == "schema":
        lines += [f"{'>' if n in item.gold else ' '} {context}" for n, context in enumerate(item.contexts)]
        return "\n".join([*lines, f"  ... {item.continuations[0]}"])
    lines += [*item.contexts[:1]]
    marks: Mapping[bool, str] = {True: ">", False: " "}
    right = range(len(item.continuations)) if item.kind in (*WRITTEN, "text") else item.gold
    lines += [f"{marks[n in right]} {text}" for n, text in enumerate(item.continuations)]
    return "\n".join(lines)
