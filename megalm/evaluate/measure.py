"""A task asked of a model, and what came out: each item's scores, and figures with their standard errors."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.evaluate.item import Item, Task
from megalm.evaluate.protocols import Prompt, Protocol
from megalm.evaluate.request import Request, Score
from megalm.evaluate.scoring import Scorer
from megalm.evaluate.statistics import Estimate, estimate_mean, estimate_ratio
from megalm.evaluate.written import MARKERS, Marker
from megalm.tokenizer.tokenizer import Tokenizer

ITEMS = 512
"""Items whose prompts are held at once: enough that sorting by length leaves little to pad."""

COUNTED = {"rules_strict": "rules", "rules_loose": "rules", "rules": "rules"}
"""Figures that are a share of something counted, over all items together -> what is counted."""

Write = Callable[[Sequence[Request], Task], list[str]]
"""What a model writes on from each request's ids, up to the task's stops."""


@dataclass(frozen=True)
class Outcome:
    """One item after it was asked."""

    values: dict[str, float]
    """Its part in each figure: 1.0 for a right answer, `nll` and `bytes` of the right continuation."""
    log_probabilities: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    chosen: dict[str, int] = field(default_factory=dict)
    text: str | None = None
    """What was written."""
    note: str = ""
    """What was wrong with it."""

    def as_dict(self) -> dict[str, Any]:
        named = {"log_probabilities": self.log_probabilities, "tokens": self.tokens, "chosen": self.chosen}
        written = {} if self.text is None else {"text": self.text, **({"note": self.note} if self.note else {})}
        return {**named, **written, "values": self.values}


@dataclass(frozen=True)
class TaskResult:
    """What a task says of a model."""

    task: str
    kind: str
    protocol: str
    num_fewshot: int
    figures: dict[str, Estimate]
    """The first is the task's own."""
    baseline: float
    """Accuracy of guessing."""
    outcomes: list[Outcome]
    data_sha256: str
    prompts_sha256: str
    """Of every id that the model was given."""
    category: str = ""
    part_of: str = ""
    """The task that it is one category of."""

    @property
    def centered(self) -> Estimate | None:
        """(accuracy - chance) / (1 - chance), of tasks that have an accuracy."""
        name = next(iter(self.figures))
        if self.kind == "text" or self.baseline >= 1:
            return None
        value, error = self.figures[name]
        room = 1 - self.baseline
        return Estimate((value - self.baseline) / room, None if error is None else error / room)

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "kind": self.kind,
            "protocol": self.protocol,
            "num_fewshot": self.num_fewshot,
            "items": len(self.outcomes),
            "figures": {name: figure.as_dict() for name, figure in self.figures.items()},
            "chance": self.baseline,
            "category": self.category,
            "part_of": self.part_of,
            "data_sha256": self.data_sha256,
            "prompts_sha256": self.prompts_sha256,
        }


def evaluate_task(
    task: Task,
    protocol: Protocol,
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    write: Write | None = None,
    markers: Mapping[str, Marker] = MARKERS,
) -> TaskResult:
    """Ask every item, or the first `limit`. On several ranks all call alike.

    write: what generates; None: a task that needs it is refused. markers: who judges what is written, by kind.
    Errors: ConfigError for an item that cannot be put to this model
    """
    marker = markers.get(task.kind)
    if marker is not None:
        marker.check(task)
    if marker is not None and write is None:
        raise ConfigError(
            f"{task.name}: it needs what the model writes, which a model that is cut over ranks cannot give here; "
            "evaluate the checkpoint with megalm evaluate"
        )
    digest = hashlib.sha256()
    outcomes: list[Outcome] = []
    items = iter(task.items)
    for prompts in _in_parts(protocol.prompts(task, tokenizer, scorer.length, limit)):
        requests = [request for prompt in prompts for request in prompt.requests]
        for request in requests:
            digest.update(np.asarray([request.count, *request.ids], "<i8").tobytes())
        if write is not None and marker is not None:
            texts = write(requests, task)
            marks = marker.mark(list(islice(items, len(texts))), texts, task)
            outcomes += [
                Outcome(mark.values, text=text, note=mark.note) for mark, text in zip(marks, texts, strict=True)
            ]
            continue
        scores = iter(scorer.score(requests))
        for prompt in prompts:
            own = list(islice(scores, len(prompt.requests)))
            outcomes.append(judge_scores(next(items), own, protocol))
    return TaskResult(
        task=task.name,
        kind=task.kind,
        protocol=protocol.name,
        num_fewshot=0 if task.kind == "text" else task.num_fewshot,
        figures=summarize(task.kind, outcomes),
        baseline=task.baseline(),
        outcomes=outcomes,
        data_sha256=task.digest(),
        prompts_sha256=digest.hexdigest(),
        category=task.category,
        part_of=task.part_of,
    )


def _in_parts(prompts: Iterator[Prompt]) -> Iterator[list[Prompt]]:
    while part := list(islice(prompts, ITEMS)):
        yield part


def judge_scores(item: Item, scores: Sequence[Score], protocol: Protocol) -> Outcome:
    """Judge what the scores of an item's requests say."""
    numbers = [score.log_probability for score in scores]
    tokens = [score.tokens for score in scores]
    if item.kind == "text":
        text = item.continuations[0]
        words = float(len(re.split(r"\s+", text)))
        values = {"nll": -math.fsum(numbers), "bytes": float(len(text.encode())), "words": words}
        return Outcome(values, numbers, tokens)
    right = item.gold[0] if item.kind != "cloze" else 0
    answer = item.continuations[right if item.kind == "choice" else 0]
    size = float(len(answer.removeprefix(" ").encode()))  # bits per byte of the answer, not of the blank before it
    likelihood = {"nll": -numbers[right], "bytes": size}
    if item.kind == "cloze":
        return Outcome({"acc": float(scores[0].likeliest), **likelihood}, numbers, tokens)
    chosen = protocol.choose(item, scores)
    hits = {name: float(option in item.gold) for name, option in chosen.items()}
    return Outcome({**hits, **likelihood}, numbers, tokens, chosen)


def summarize(kind: str, outcomes: Sequence[Outcome]) -> dict[str, Estimate]:
    """Summarize figures of a task: accuracies first, then what the right continuation costs.

    Bits per byte: -sum log2 p(right) / bytes, over all items together; of a text's perplexities the word's is lm-eval's.
    """
    if not outcomes:
        return {}
    names = [name for name in outcomes[0].values if name not in ("nll", "bytes", "words", *COUNTED)]
    figures = {name: estimate_mean([one.values[name] for one in outcomes]) for name in names}
    for name, count in COUNTED.items():
        if count in outcomes[0].values and name != count:
            parts, wholes = ([one.values[key] for one in outcomes] for key in (name, count))
            figures[name] = estimate_ratio(parts, wholes)
    if "nll" not in outcomes[0].values:
        return figures
    nll = [one.values["nll"] for one in outcomes]
    sizes = [one.values["bytes"] for one in outcomes]
    value, error = estimate_ratio(nll, sizes)
    figures["bits_per_byte"] = Estimate(value / math.log(2), None if error is None else error / math.log(2))
    if kind == "text":
        words = estimate_ratio(nll, [one.values["words"] for one in outcomes])
        figures["byte_perplexity"] = _exp(Estimate(value, error))
        figures["word_perplexity"] = _exp(words)
    if kind == "cloze":
        figures["perplexity"] = _exp(estimate_mean(nll))
    return figures


def _exp(figure: Estimate) -> Estimate:
    value = math.exp(figure.value) if figure.value < 700 else math.inf
    return Estimate(value, None if figure.error is None else value * figure.error)
