"""Suites: which tasks together, shipped by name or in a file of one's own."""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.evaluate.item import WRITTEN, Item, Task
from megalm.evaluate.tasks.harness import read_task, read_yaml
from megalm.evaluate.tasks.rows import TYPES, guess_kind, read_items, read_rows

SHIPPED = Path(__file__).parent.parent / "suites"
"""The suites that come with megalm; of their data only the smoke suite's does."""
DATA = Path("data/evaluation")
"""Where `megalm evaluate fetch` puts public sets."""


@dataclass(frozen=True)
class Suite:
    """Tasks that are asked together."""

    name: str
    tasks: tuple[Task, ...]
    protocol: str
    """The one that it is meant for."""
    categories: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 of all items: the same suite has the same figures."""
        return hashlib.sha256("".join(task.digest() for task in self.tasks).encode()).hexdigest()


def list_suites() -> list[str]:
    """List names of the shipped suites."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_suite(name: str, data: Path = DATA) -> Path:
    """Find the file of a suite that is shipped, or that is given as a file. ConfigError where there is neither."""
    if (shipped := SHIPPED / f"{name}.yaml").exists():
        return shipped
    if Path(name).exists():
        return Path(name)
    near = difflib.get_close_matches(name, list_suites(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"suite {name!r}: neither one of {', '.join(list_suites())}, nor a file (a suite's or lm-eval task's .yaml, or .jsonl)"
        f".{hint}"
    )


def read_suite(name: str, data: Path = DATA, only: Sequence[str] = ()) -> Suite:
    """Read a suite's tasks with their items. data: where fetched sets lie. only: names of tasks; empty: all.

    A .yaml is a suite in the gauntlet's form (`icl_tasks`), a list of lm-eval's tasks (`task: [file, ...]`), or one of
    lm-eval's tasks; a .jsonl is one task, whose kind its first row says.
    Errors: ConfigError for what is missing, and what fetches it
    """
    path = find_suite(name, data)
    if path.suffix == ".jsonl":
        return Suite(path.stem, (read_file(path),), "core")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: neither a suite (icl_tasks) nor a task of lm-eval")
    if "icl_tasks" in content:
        entries = content["icl_tasks"]
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise ConfigError(f"{path}: icl_tasks must be a list of tasks with label, dataset_uri, icl_task_type")
        chosen = [one for one in entries if not only or any(_is_of(name, one) for name in only)]
        labels = [str(one.get("label")) for one in entries]
        _check_names(path, [name for name in only if not any(_is_of(name, one) for one in chosen)], labels)
        _check_there(path, chosen, data)
        chances = read_chances(path.with_name("eval_meta_data.csv"))
        made = (make_task({**chances.get(str(one["label"]), {}), **one}, path, data) for one in chosen)
        tasks = tuple(part for one, task in zip(chosen, made, strict=True) for part in split_task(task, one, path))
        if only:
            _check_names(path, only, [*labels, *(task.name for task in tasks)])
            tasks = tuple(task for task in tasks if task.name in only or task.part_of in only)
    elif isinstance(content.get("task"), list):
        tasks = tuple(read_task(path.parent / str(one)) for one in content["task"])
        _check_names(path, only, [task.name for task in tasks])
        tasks = tuple(task for task in tasks if not only or task.name in only)
    else:
        tasks = (read_task(path),)
        _check_names(path, only, [task.name for task in tasks])
    twice = sorted({task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1})
    if twice:
        raise ConfigError(f"{path}: two tasks are called {twice[0]!r}; give each a name of its own")
    default = "core" if "icl_tasks" in content else "lm_eval"
    return Suite(str(content.get("name", path.stem)), tasks, str(content.get("protocol", default)))


def read_chances(path: Path) -> dict[str, dict[str, float]]:
    """Read what CORE's bundle takes for chance, by task, from its table in percent; {} where there is no table."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {row["Eval Task"]: {"random_baseline": float(row["Random baseline"]) / 100} for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: needs the columns 'Eval Task' and 'Random baseline' in percent ({error})") from None


def read_file(path: Path) -> Task:
    """Read a jsonl file as a task, whose kind its first row says."""
    where, row = next(read_rows(path), ("", {}))
    kind = guess_kind(row)
    if kind is None:
        raise ConfigError(
            f"{where or path}: neither choices, context_options, continuation, answer nor text is in it, so what kind of item it "
            "is cannot be told"
        )
    return Task(path.stem, kind, read_items(path, kind), **DEFAULTS.get(kind, {}))


GENERATED: dict[str, Any] = {"stop": ("\n",), "compare": {"normalize": True}}
"""How rows that are written on from are judged where a suite says nothing: one line, by the gauntlet's comparison."""
DEFAULTS: dict[str, dict[str, Any]] = {"generate": GENERATED, "instruct": {"chat": True, "max_tokens": 1280}}
DEFAULTS["code"] = {"stop": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), "max_tokens": 512}
"""Settings of kinds whose model writes, where a suite says nothing: a request's answer is a conversation's, a function ends
where the next statement of the module begins."""


COMPARED: dict[str, dict[str, bool]] = {"text": {"normalize": True}, "math": {"math": True}}
"""How a suite may have what is written compared with the answers."""


def make_task(entry: Mapping[str, Any], suite: Path, data: Path) -> Task:
    """Make a task of a suite's entry in the gauntlet's form."""
    label = str(entry.get("label"))
    kind = TYPES.get(str(entry.get("icl_task_type")))
    if kind is None:
        raise ConfigError(
            f"{suite}: {label}: icl_task_type {entry.get('icl_task_type')!r}; there are {', '.join(TYPES)}"
        )
    shots = entry.get("num_fewshot", 0)
    if isinstance(shots, list):
        if len(shots) != 1:
            raise ConfigError(f"{suite}: {label}: num_fewshot {shots}: one number a task, or a task for each")
        shots = shots[0]
    if shots and kind == "instruct":
        raise ConfigError(
            f"{suite}: {label}: num_fewshot {shots}: a request with rules has no answer that an example shows"
        )
    settings: dict[str, Any] = dict(DEFAULTS.get(kind, {}))
    if kind in WRITTEN:
        if "early_stopping_criteria" in entry:
            settings["stop"] = tuple(entry["early_stopping_criteria"])
        settings["max_tokens"] = int(entry.get("max_tokens", settings.get("max_tokens", 64)))
        settings["chat"] = bool(entry.get("chat", settings.get("chat", False)))
    if kind == "generate":
        if (how := entry.get("compare", "text")) not in COMPARED:
            raise ConfigError(f"{suite}: {label}: compare {how!r}; there are {', '.join(COMPARED)}")
        settings["compare"] = dict(COMPARED[entry.get("compare", "text")])
        if entry.get("cot_delimiter"):
            settings["compare"]["after"] = str(entry["cot_delimiter"])
    items = read_items(find_data(str(entry["dataset_uri"]), suite, data), kind)
    if "cot_delimiter" in entry:
        items = tuple(_show_thought(item, str(entry["cot_delimiter"])) for item in items)
    chance = entry.get("random_baseline", entry.get("chance"))
    return Task(
        name=label,
        kind=kind,
        items=items,
        num_fewshot=int(shots),
        description=str(entry.get("prompt_string", "")),
        prelimiter=str(entry.get("question_prelimiter", "")),
        delimiter=str(entry.get("continuation_delimiter", " ")),
        example_delimiter=entry.get("example_delimiter"),
        chance=None if chance is None else float(chance),
        category=str(entry.get("category", "")),
        **settings,
    )


def split_task(task: Task, entry: Mapping[str, Any], suite: Path) -> list[Task]:
    """A task whose suite says `has_categories` as one for each: examples come from the item's own, and the means count alike."""
    if not entry.get("has_categories"):
        return [task]
    parts: dict[str, list[Item]] = {}
    for number, item in enumerate(task.items, 1):
        category = item.source.get("category")
        if not isinstance(category, str) or not category:
            raise ConfigError(
                f"{suite}: {task.name}: has_categories, and its item {number} has no text under 'category'"
            )
        parts.setdefault(category, []).append(item)
    return [
        replace(
            task, name=f"{task.name}-{re.sub(r'[^a-z0-9]+', '_', name.lower())}", items=tuple(items), part_of=task.name
        )
        for name, items in parts.items()
    ]


def _show_thought(item: Item, delimiter: str) -> Item:
    """As an example it is answered with the thoughts that its row has."""
    thought = item.source.get("chain_of_thought")
    return replace(item, shown=f"{thought}{delimiter}{item.continuations[0]}") if thought else item


def _is_of(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a task's name is an entry's label, or one of its categories."""
    label = str(entry.get("label"))
    return name == label or (bool(entry.get("has_categories")) and name.startswith(f"{label}-"))


def find_data(name: str, suite: Path, data: Path) -> Path:
    """Find a task's file: beside the suite, else among what was fetched."""
    places = [suite.parent / name, data / name, Path(name)]
    return next((place for place in places if place.exists()), places[1 if suite.parent == SHIPPED else 0])


def _check_there(suite: Path, entries: Sequence[Mapping[str, Any]], data: Path) -> None:
    without = [str(one.get("label")) for one in entries if not isinstance(one.get("dataset_uri"), str)]
    if without:
        raise ConfigError(f"{suite}: {without[0]}: dataset_uri is missing; it names the task's jsonl file")
    missing = [find_data(one["dataset_uri"], suite, data) for one in entries]
    missing = [place for place in missing if not place.exists()]
    if missing:
        shown = ", ".join(str(place) for place in missing[:4]) + (", ..." if len(missing) > 4 else "")
        shipped = suite.parent == SHIPPED
        how = f"megalm evaluate fetch {suite.stem}" if shipped else "put the files there, or correct dataset_uri"
        raise ConfigError(
            f"{suite.stem}: {len(missing)} of {len(entries)} tasks lack their data: {shown}. To get them: {how}"
        )


def _check_names(path: Path, only: Sequence[str], names: Sequence[str]) -> None:
    unknown = [one for one in only if one not in names]
    if unknown:
        raise ConfigError(f"{path}: there is no task {unknown[0]!r}; there are {', '.join(names)}")
