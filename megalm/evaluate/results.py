"""Results on disk: a folder a model, suite and protocol, with every item's scores, written as each task is done.

evaluation/core-lm_eval-step-1000/results.json      the figures, and hashes of the model, the prompts and the data
                                  arc_easy.jsonl    what it was computed of on the first line, then a line an item
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.evaluate.measure import Outcome, TaskResult, summarize
from megalm.evaluate.statistics import Estimate
from megalm.parallel.slices import list_boxes

RESULTS = "results.json"


def digest_model(model: nn.Module) -> str:
    """xxh3-128 of all weights by name, as they are computed with."""
    state = xxhash.xxh3_128()
    for box in sorted(list_boxes(model), key=lambda box: box.name):
        state.update(f"{box.name} {tuple(box.global_shape)} {box.tensor.dtype}".encode())
        state.update(box.tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def average(results: Sequence[TaskResult]) -> dict[str, Estimate]:
    """Accuracy above chance, (accuracy - chance) / (1 - chance): the mean of a task's parts, of the tasks in each category,
    then of categories.

    {} where no task has an accuracy. `average` is the last; a suite without categories has it alone.
    """
    by_task: dict[tuple[str, str], list[Estimate]] = {}
    for result in results:
        if result.centered is not None:
            by_task.setdefault((result.category, result.part_of or result.task), []).append(result.centered)
    by_category: dict[str, list[Estimate]] = {}
    for (category, _), parts in by_task.items():
        by_category.setdefault(category, []).append(_mean(parts))
    means = {category: _mean(found) for category, found in by_category.items()}
    if not means:
        return {}
    named = {category: figure for category, figure in means.items() if category}
    return {**named, "average": _mean(list(means.values()))}


def _mean(figures: Sequence[Estimate]) -> Estimate:
    """Of independent figures: errors add up in squares."""
    value = sum(figure.value for figure in figures) / len(figures)
    errors = [figure.error or 0.0 for figure in figures]
    return Estimate(value, sum(error**2 for error in errors) ** 0.5 / len(figures))


@dataclass(frozen=True)
class Identity:
    """What a figure was computed of and how: with the same, it is the same."""

    model: str
    suite: str
    protocol: str
    tokenizer: str
    length: int
    limit: int | None
    dtype: str

    def key(self, data_sha256: str, num_fewshot: int) -> dict[str, Any]:
        """What a task's file begins with."""
        return {**vars(self), "data_sha256": data_sha256, "num_fewshot": num_fewshot}


class ResultFolder:
    """Keeps each task's result as soon as it is there; what is there already for the same identity is not computed again."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Errors: ConfigError where the folder cannot be made"""
        self.folder, self.identity = folder, identity
        with explain_failed_writes(folder, key="--output"):
            folder.mkdir(parents=True, exist_ok=True)

    def find(self, task: str, data_sha256: str, num_fewshot: int) -> TaskResult | None:
        """Find a task's result that was computed before, of the same model, items and settings."""
        try:
            result, key = read_task_result(self.folder / f"{task}.jsonl")
        except ConfigError:
            return None
        return result if key == self.identity.key(data_sha256, num_fewshot) else None

    def keep(self, result: TaskResult) -> None:
        """Write a task's file whole."""
        head = {"of": self.identity.key(result.data_sha256, result.num_fewshot), "result": result.as_dict()}
        lines = [head, *({"item": n, **one.as_dict()} for n, one in enumerate(result.outcomes))]
        with explain_failed_writes(self.folder, key="--output"):
            write_whole(self.folder / f"{result.task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def finish(self, results: Sequence[TaskResult], facts: Mapping[str, Any]) -> Path:
        """Write results.json; facts: of the model and the machine."""
        content = {
            **facts,
            **vars(self.identity),
            "tasks": [result.as_dict() for result in results],
            "averages": {name: figure.as_dict() for name, figure in average(results).items()},
        }
        path = self.folder / RESULTS
        with explain_failed_writes(self.folder, key="--output"):
            write_whole(path, json.dumps(content, indent=2) + "\n")
        return path


def read_task_result(path: Path) -> tuple[TaskResult, dict[str, Any]]:
    """Read a task's file, and what it was computed of. Errors: ConfigError where it is none"""
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        outcomes = [
            Outcome(
                line["values"],
                line["log_probabilities"],
                line["tokens"],
                line["chosen"],
                line.get("text"),
                line.get("note", ""),
            )
            for line in lines
        ]
        said, key = head["result"], head["of"]
        result = TaskResult(
            task=said["task"],
            kind=said["kind"],
            protocol=said["protocol"],
            num_fewshot=said["num_fewshot"],
            figures=summarize(said["kind"], outcomes),
            baseline=said["chance"],
            outcomes=outcomes,
            data_sha256=said["data_sha256"],
            prompts_sha256=said["prompts_sha256"],
            category=said["category"],
            part_of=said.get("part_of", ""),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not the result of a task ({type(error).__name__}: {error})") from None
    return result, key


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a folder. Errors: ConfigError where there is none"""
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["tasks"], content["protocol"]  # noqa: B018 (that they are there)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no results of an evaluation ({type(error).__name__}); megalm evaluate MODEL writes them"
        ) from None
    return content
