"""report.html: what a run did, on one page that needs nothing beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.journal import (
    QUIET,
    choose_course,
    describe_event,
    describe_event_details,
    encode_json,
    format_number,
    read_events,
    read_number,
    read_steps,
)
from megalm.observe.comparison import COLUMNS, TITLE, list_comparison_rows
from megalm.page.document import Block, Dot, Facts, Fold, Heading, Table, render_page
from megalm.page.plots import Band, Line, Lines, Mark
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

MARK_COLOURS = {
    "spike": "#d9802b",
    "skip": "#c9a227",
    "replay": "#4aa3a8",
    "rollback": "#c0392b",
    "recovered": "#4f9d69",
    "lr_adjust": "#8063ab",
    "give_up": "#7d3030",
    "router": "#b5651d",
    "fp8": "#b5651d",
    "widen": "#8063ab",
}
OTHER_COLOUR = "#7d8894"
WATCHED = (
    ("update_rms", "size of the update", "largest RMS of a tensor's change"),
    ("attention_logit", "largest attention logit", "on a sample of queries"),
)
ROUTER = (
    ("max_load", "largest load of an expert, by layer", "times the mean"),
    ("dead", "experts without a token, by layer", "experts"),
    ("entropy", "entropy of the router's mean probability, by layer", "share of the even one's"),
)
FP8 = (
    ("largest", "largest magnitude of an operand of 8-bit products, by layer", ""),
    ("zeroed", "elements that the cast to 8 bits makes zero, of the worst operand, by layer", "share"),
)
EVALUATED = (
    (("acc", "acc_per_char", "average"), "accuracy on tasks", "share right; average: above chance"),
    (("bits_per_byte",), "bits per byte on tasks", "of the right answers"),
)
"""Figures of a suite that are drawn: each task's own accuracy, and what moves before it does."""
MOST_TASKS = 12
MOST_LAYERS = 8
"""Layers with a line of their own; of more the worst layer's is shown alone."""
MOST_EVENTS = 500
"""Events in the table: the first and the last half of so many. All of them are in events.jsonl."""


class ReportHook(Hook):
    """Writes the page when the run ends, whatever the reason."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        write_report(self.folder)


def write_report(folder: Path) -> Path:
    """Make `report.html` from a run's folder: metrics, events, configuration, plan and sample, as far as they are there."""
    metrics = read_steps(folder / "metrics.jsonl")
    events = read_events(folder / "events.jsonl")
    texts = {name: _text_of(folder / name) for name in ("sample.txt", "plan.json", "config.yaml")}
    file = folder / "report.html"
    file.write_text(render(folder.name, metrics, events, texts), encoding="utf-8")
    return file


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def render(name: str, metrics: list[dict[str, Any]], events: list[dict[str, Any]], texts: dict[str, str]) -> str:
    """Make the page's text. `texts`: contents of sample.txt, plan.json and config.yaml, as far as they are there."""
    course = choose_course(metrics)
    blocks: list[Block] = [Facts(summarize(course.steps))]
    rows = list_comparison_rows(_plan(texts.get("plan.json", "")))
    blocks += [Table(TITLE, COLUMNS, rows)] if rows else []
    blocks += draw_plots(course.steps, _marks(events), _bands(events), course.abandoned)
    blocks += [Heading("Events"), *_events(events)]
    if texts.get("sample.txt"):
        blocks += [Heading("What the model writes"), Fold("sample.txt", texts["sample.txt"], opened=True)]
    blocks.append(Heading("How it was set"))
    blocks += [Fold(file, texts[file]) for file in ("plan.json", "config.yaml") if texts.get(file)]
    return render_page(name, blocks)


def _plan(text: str) -> dict[str, Any]:
    """Read the plan's numbers; {} where the file is not there or damaged: the page is then made without them."""
    try:
        plan = json.loads(text)
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}


def draw_plots(
    metrics: list[dict[str, Any]],
    marks: Sequence[Mark],
    bands: Sequence[Band] = (),
    abandoned: Sequence[list[dict[str, Any]]] = (),
) -> list[Lines]:
    """Plot loss (with held-out loss), gradient norm, learning rate, ... over steps; pale what the run went back on."""

    def line(label: str, key: str, records: list[dict[str, Any]] = metrics, pale: bool = False) -> Line:
        return Line(
            label, [(r["step"], value) for r in records if (value := read_number(r.get(key))) is not None], pale
        )

    def plot(title: str, unit: str, lines: list[Line], *keys: str, log: str = "") -> Lines:
        left = [line("", key, stretch, pale=True) for key in keys for stretch in abandoned]
        left = [each for each in left if each.points]
        return Lines(title, "step", unit, lines + left, log, marks, bands)

    losses = [line("training", "loss"), line("held-out", "eval/loss")]
    plots = [plot("loss", "nats a token", [each for each in losses if each.points], "loss")]
    sources = list(dict.fromkeys(key for record in metrics for key in record if key.startswith("loss/")))
    if sources:
        lines = [line(key.removeprefix("loss/"), key) for key in sources]
        plots.append(plot("loss by source", "nats a token", lines, *sources))
    for figures, title, unit in EVALUATED:
        keys = [key for key in dict.fromkeys(k for r in metrics for k in r) if _evaluates(key, figures)]
        if keys:
            plots.append(plot(title, unit, [line("/".join(key.split("/")[1:]), key) for key in keys[:MOST_TASKS]]))
    plots += [
        plot("gradient norm", "L2, before clipping", [line("gradient norm", "grad_norm")], "grad_norm", log="y"),
        plot("learning rate", "learning rate", [line("learning rate", "lr")], "lr"),
        plot("throughput", "tokens a second", [line("tokens/s", "tokens_per_s")], "tokens_per_s"),
    ]
    for key, title, unit in WATCHED:
        if any(record.get(key) is not None for record in metrics):
            plots.append(plot(title, unit, [line(title, key)], key, log="y"))
    for group, part, title, unit in (*(("router", *row) for row in ROUTER), *(("fp8", *row) for row in FP8)):
        measured: dict[str, Any] = next((record for record in reversed(metrics) if f"{group}/{part}" in record), {})
        layers = [key for key in measured if key.split("/")[::2] == [group, part]]
        if len(layers) > MOST_LAYERS:
            layers = [f"{group}/{part}"]
        if layers:
            lines = [line(key.split("/")[1] if key.count("/") > 1 else "the worst", key) for key in layers]
            plots.append(plot(title, unit, lines, *layers))
    if any(record.get("mfu") is not None for record in metrics):
        both = any(record.get("hfu") != record["mfu"] for record in metrics if record.get("mfu") is not None)
        lines = [line("model", "mfu"), *([line("hardware", "hfu")] if both else [])]
        plots.append(plot("utilisation", "of the matrix peak", lines, "mfu"))
    return plots


def _evaluates(key: str, figures: Sequence[str]) -> bool:
    parts = key.split("/")
    return parts[0] == "eval" and parts[-1] in figures


def summarize(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Sum the run up in a few numbers."""
    if not metrics:
        return {"steps": "0"}
    last = metrics[-1]
    evaluated = [record["eval/loss"] for record in metrics if record.get("eval/loss") is not None]
    times = sorted(value for record in metrics if (value := read_number(record.get("step_time_s"))) is not None)
    numbers = {
        "steps": format_number(last["step"], ",.0f"),
        "tokens": format_number(last.get("tokens"), ",.0f"),
        "first loss": format_number(metrics[0].get("loss"), ".4f"),
        "last loss": format_number(last.get("loss"), ".4f"),
        "median step": f"{format_number(times[len(times) // 2], '.3f')} s" if times else "-",
        "updates refused": str(sum(bool(record.get("skipped")) for record in metrics)),
    }
    if evaluated:
        numbers["held-out loss"] = format_number(evaluated[-1], ".4f")
    return numbers


def _marks(events: list[dict[str, Any]]) -> list[Mark]:
    return [
        Mark(event["step"], event["kind"], describe_event(event), MARK_COLOURS.get(event["kind"], OTHER_COLOUR))
        for event in events
        if event["kind"] not in QUIET
    ]


def _bands(events: list[dict[str, Any]]) -> list[Band]:
    """Find the steps that were taken back, or made again to look for the cause."""
    return [
        Band(event["to_step"], event["step"], "taken back", describe_event(event))
        for event in events
        if event["kind"] in ("rollback", "replay") and isinstance(event.get("to_step"), int)
    ]


def _events(events: list[dict[str, Any]]) -> list[Block]:
    rows = [
        (
            str(event["step"]),
            Dot(event["kind"], MARK_COLOURS.get(event["kind"], OTHER_COLOUR)),
            describe_event_details(event),
            Fold("all of it", encode_json({k: v for k, v in event.items() if k not in ("step", "kind")}, indent=1)),
        )
        for event in events
    ]
    left_out = len(rows) - MOST_EVENTS
    if left_out > 0:
        half = MOST_EVENTS // 2
        rows = rows[:half] + rows[-half:]
    note = f"{left_out} events between these are in events.jsonl alone." if left_out > 0 else None
    return [Table("", ("step", "event", "what happened", ""), rows, note)]
