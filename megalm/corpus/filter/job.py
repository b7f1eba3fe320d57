"""The one stage of filtering: a shard's documents through the rules, into what stays and the list of what goes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.corpus import Corpus, ShardStage
from megalm.corpus.dedup.files import save
from megalm.corpus.dedup.removal import count_unread, join, write_json_row
from megalm.corpus.fields import is_one_text
from megalm.corpus.filter.batch import STAYS, Batch, Bound
from megalm.corpus.filter.reading import Documents, make_bad_records, read_documents
from megalm.corpus.filter.rules import RuleSet, make_rules
from megalm.corpus.filter.statistics import Alone, Watcher

DIGITS = 6  # of a score that is written


@dataclass(frozen=True)
class Outcome:
    """What the rules did with the documents."""

    documents: int
    dropped: int
    changed: int
    """Documents that stay, with another text than before."""
    bad: int
    by_rule: dict[str, int] = field(default_factory=dict)
    """How many each rule dropped, in the order of the rules; a document counts for the first that drops it."""
    characters: int = 0
    characters_left: int = 0
    listed: tuple[str, ...] = ()
    alone: dict[str, Alone] = field(default_factory=dict)
    """Of each rule, if the shards were watched."""


@dataclass(frozen=True)
class _Plan:
    """What a shard's task needs: the rules as JSON, and what is written."""

    rules: str
    column: str
    label_only: bool
    keep: bool
    drop: bool
    watch: bool


def filter_documents(
    corpus: Corpus,
    contents: Sequence[Mapping[str, Any]],
    output: str | None = None,
    dropped: str | None = None,
    column: str = "filter",
    label_only: bool = False,
    watch: bool = False,
) -> Outcome:
    """Runs the rules (as `read_rules` gives them) over a corpus.

    output: gets the documents that stay, or all with `label_only`, as JSON lines; with a `column`, its object says `kept`,
    `rule`, `value` and `scores`. dropped: gets place, rule, value and scores of those that go. watch: shards leave what
    the functions of `statistics` read.
    Errors: ConfigError for rules that cannot be, or that edit a text which is made of several fields.
    """
    rules = make_rules(contents)
    name = corpus.shards[0].field if corpus.shards else "text"
    if rules.edits and not label_only and not is_one_text(name):
        raise ConfigError(
            f"--field {name!r} makes one text of several values, and a rule edits texts: name a single field, or pass "
            "--label-only."
        )
    plan = _Plan(json.dumps(list(contents)), column, label_only, bool(output), bool(dropped), watch)
    results = corpus.each_shard(_filter_shard, plan, "filtering")
    for path, part in ((output, "kept"), (dropped, "dropped")):
        if path:
            join(corpus, part, path)
    corpus.results.mark(corpus.files)
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    alone = np.zeros((2, sum(isinstance(item, Bound) for item in rules.items)), np.int64)
    for _, found in results:
        counts.update(found.pop("by_rule"))
        if watch:
            alone += np.array(found.pop("alone"), np.int64)
        total.update(found)
    bad, listed = count_unread(corpus)
    by_rule = {rule: counts[rule] for rule in dict.fromkeys(filter(None, rules.names))}
    return Outcome(
        corpus.documents,
        sum(by_rule.values()),
        total["changed"],
        bad,
        by_rule,
        total["characters"],
        total["characters_left"],
        listed,
        {name: Alone(*map(int, alone[:, number])) for number, name in enumerate(filter(None, rules.names))}
        if watch
        else {},
    )


@lru_cache(maxsize=4)
def _load_rules(text: str) -> RuleSet:
    return make_rules(json.loads(text))


def _filter_shard(stage: ShardStage) -> tuple[int, dict[str, Any]]:
    """Leaves the shard's part of both lists, and what could not be read."""
    plan: _Plan = stage.argument
    rules = _load_rules(plan.rules)
    total: Counter[str] = Counter()
    by_rule: Counter[str] = Counter()
    bad: list[list[Any]] = []
    documents = 0
    watcher = Watcher(rules) if plan.watch else None
    with _Parts(stage, plan) as parts:
        for some in read_documents(stage.shard, rules.needs_fields):
            bad += make_bad_records(some, documents)
            documents += len(some.texts)
            if len(some.texts) == 0:
                parts.write_bad(some, 0, -1)
                continue
            batch = Batch(some.texts, some.fields if rules.needs_fields else (), rules.settings)
            try:
                rules.apply(batch)
            except ConfigError as error:
                raise ConfigError(f"{some.piece.label}: {error}") from error
            if watcher is not None:
                watcher.see(some, batch)
            _write(some, batch, rules, plan, parts)
            stays = batch.dropped_by == STAYS
            by_rule.update(rules.names[number] for number in batch.dropped_by[~stays].tolist())
            before, after = some.texts.count_characters(), batch.texts.count_characters()
            total["characters"] += int(before.sum())
            total["characters_left"] += int((before if plan.label_only else after)[stays].sum())
            total["changed"] += int((batch.changed & stays).sum())
    save(stage.path("paths"), _as_bytes([piece.label for piece in stage.shard.pieces]))
    save(stage.path("bad"), _as_bytes(bad))
    found: dict[str, Any] = {**total, "by_rule": dict(by_rule)}
    if watcher is not None:
        watcher.save(stage)
        found["alone"] = [watcher.drops.tolist(), watcher.only.tolist()]
    return documents, found


def _as_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


class _Parts:
    """The two files of a shard, which are there when both are whole."""

    def __init__(self, stage: ShardStage, plan: _Plan):
        self._paths = [stage.path(part) for part, wanted in (("kept", plan.keep), ("dropped", plan.drop)) if wanted]
        self._plan = plan
        self.kept: BinaryIO | None = None
        self.dropped: BinaryIO | None = None

    def __enter__(self) -> _Parts:
        files = [open(f"{path}.{os.getpid()}.partial", "wb", buffering=1 << 20) for path in self._paths]  # noqa: SIM115
        self.kept = files[0] if self._plan.keep else None
        self.dropped = files[-1] if self._plan.drop else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for file, path in zip((f for f in (self.kept, self.dropped) if f), self._paths, strict=True):
            file.close()
            if kind is None:
                os.replace(file.name, path)

    def write_bad(self, some: Documents, at: int, stop: int) -> None:
        """What could not be read before document `stop` (-1: all that is left), from number `at` of the bad ones on."""
        for before, found in some.bad[at:]:
            if self.dropped is None or (stop >= 0 and before > stop):
                return
            row = {"file": some.piece.label, "place": found.place, "rule": "cannot be read", "reason": found.reason}
            self.dropped.write(write_json_row(row))


def _write(some: Documents, batch: Batch, rules: RuleSet, plan: _Plan, parts: _Parts) -> None:
    """The documents of a batch, into what stays and what goes."""
    stays = (batch.dropped_by == STAYS).tolist()
    columns = {name: _as_numbers(values) for name, values in batch.columns.items()}
    values = _as_numbers(batch.value)
    edited = rules.edits and not plan.label_only
    texts = list(batch.texts) if edited and plan.keep else []
    changed, dropped_by, bad = batch.changed.tolist(), batch.dropped_by.tolist(), 0
    for number, kept in enumerate(stays):
        while bad < len(some.bad) and some.bad[bad][0] <= number:
            parts.write_bad(some, bad, number)
            while bad < len(some.bad) and some.bad[bad][0] <= number:
                bad += 1
        scores = {name: column[number] for name, column in columns.items()}
        labels = {name: label[number] for name, label in batch.labels.items()}
        found = (
            {"rule": None, "value": None}
            if kept
            else {"rule": rules.names[dropped_by[number]], "value": values[number]}
        )
        if parts.dropped is not None and not kept:
            row = {"file": some.piece.label, "place": some.place(number), **found, **labels, "scores": scores}
            parts.dropped.write(write_json_row(row))
        if parts.kept is not None and (kept or plan.label_only):
            mark = json.dumps({"kept": kept, **found, **labels, "scores": scores}).encode() if plan.column else b""
            text = texts[number] if edited and changed[number] else None
            parts.kept.write(some.write(number, text, plan.column, mark))
    parts.write_bad(some, bad, -1)


def _as_numbers(values: np.ndarray) -> list[float | int | None]:
    """As they are written: whole numbers without a point, none where there is no number."""
    rounded = np.round(values, DIGITS)
    finite = np.isfinite(rounded)
    whole = rounded == np.floor(rounded)
    return [
        (int(value) if is_whole else value) if good else None
        for value, good, is_whole in zip(rounded.tolist(), finite.tolist(), whole.tolist(), strict=True)
    ]
