"""Pages that need nothing beside them: items with what was found, and models beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.evaluate.lint import Linted, describe_item
from megalm.evaluate.measure import TaskResult
from megalm.evaluate.results import read_results, read_task_result
from megalm.evaluate.statistics import Paired, compare_paired
from megalm.page.document import Block, Facts, Fold, Heading, Table, render_page

MOST_ITEMS = 200
"""Items of a finding, or of a file, that a page shows."""


def render_findings(linted: Sequence[Linted]) -> str:
    """Render the page of `megalm evaluate lint`."""
    blocks: list[Block] = []
    for one in linted:
        blocks += [Heading(one.name), Facts({"kind": one.kind, "items": str(len(one.items))})]
        rows = [
            (
                finding.check,
                finding.text,
                Fold(f"{len(finding.items)} items", _texts(one, finding.items)) if finding.items else "",
            )
            for finding in one.findings
        ]
        blocks.append(Table("findings", ("check", "what", "items"), rows) if rows else "Nothing was found.")
        blocks.append(Fold("read the items", _texts(one, range(1, len(one.items) + 1))))
    return render_page("What is in the test", blocks)


def _texts(linted: Linted, numbers: Sequence[int]) -> str:
    shown = [f"{n}.\n{describe_item(linted.items[n - 1])}" for n in numbers[:MOST_ITEMS] if n <= len(linted.items)]
    return "\n\n".join(shown)


@dataclass(frozen=True)
class Compared:
    """Several models on one task."""

    task: str
    figure: str
    results: list[TaskResult]
    against_first: list[Paired | None]
    """Of each model, against the first; None for the first, and where the items differ."""


def compare_folders(folders: Sequence[Path]) -> tuple[list[str], list[Compared]]:
    """(name of each model, each task that all have). Errors: ConfigError for other protocols or items, which no test compares"""
    contents = [read_results(folder) for folder in folders]
    protocols = {content["protocol"] for content in contents}
    if len(protocols) > 1:
        raise ConfigError(
            f"these are figures of different protocols ({', '.join(sorted(protocols))}), which say nothing of each other: "
            "evaluate the models by one"
        )
    names = [str(folder) for folder in folders]
    tasks = [{task["task"]: task for task in content["tasks"]} for content in contents]
    shared = [name for name in tasks[0] if all(name in own for own in tasks)]
    if not shared:
        raise ConfigError("these results have no task in common")
    compared = []
    for name in shared:
        hashes = {own[name]["data_sha256"] for own in tasks}
        if len(hashes) > 1 or len({(own[name]["items"], own[name]["num_fewshot"]) for own in tasks}) > 1:
            raise ConfigError(f"{name}: the items differ between these results: evaluate the models on the same data")
        results = [read_task_result(folder / f"{name}.jsonl")[0] for folder in folders]
        figure = next(iter(results[0].figures))
        first = [_value(results[0].kind, one.values, figure) for one in results[0].outcomes]
        paired: list[Paired | None] = [None]
        for result in results[1:]:
            own = [_value(result.kind, one.values, figure) for one in result.outcomes]
            paired.append(compare_paired(first, own))
        compared.append(Compared(name, figure, results, paired))
    return names, compared


def _value(kind: str, values: dict[str, float], figure: str) -> float:
    """An item's part in the figure; of a text its own bits per byte."""
    return values[figure] if figure in values else values["nll"] / max(1.0, values["bytes"]) / 0.6931471805599453


def compare_rows(compared: Sequence[Compared]) -> list[list[str]]:
    """A row a task: its figure for each model with a 95% interval, and whether it differs from the first's."""
    rows = []
    for one in compared:
        row = [one.task, one.figure]
        for result, paired in zip(one.results, one.against_first, strict=True):
            value, error = result.figures[one.figure]
            cell = f"{value:.3f}" + (f" ± {1.96 * error:.3f}" if error is not None else "")
            if paired is not None:
                cell += f"  ({paired.difference:+.3f}, p {paired.p_value:.2g}{' *' if paired.p_value < 0.05 else ''})"
            row.append(cell)
        rows.append(row)
    return rows


def render_comparison(names: Sequence[str], compared: Sequence[Compared], protocol: str) -> str:
    """Render the page of `megalm evaluate compare`."""
    note = (
        "± is half of a 95% interval. In brackets: the difference from the first model item by item, and the chance of one as "
        "large if both were alike (exact sign test for right and wrong); * below 0.05, which one task in twenty reaches by luck."
    )
    blocks: list[Block] = [
        Facts({"protocol": protocol, "tasks": str(len(compared)), "models": str(len(names))}),
        Table("figures", ("task", "figure", *names), compare_rows(compared), note),
    ]
    return render_page("Models beside each other", blocks)
