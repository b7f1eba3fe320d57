"""report.html: what a run did, on one page that needs nothing beside it."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.hooks import Hook
from megalm.observe.events import QUIET, event_text, read_json_lines
from megalm.observe.metrics import last_course
from megalm.observe.svg import Chart, Line, Mark

if TYPE_CHECKING:
    from megalm.trainer import Trainer

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; color: #1f2937; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; border-bottom: 1px solid #e5e7eb; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
svg { width: 100%; background: #fff; border: 1px solid #e5e7eb; border-radius: 6px; }
svg text { font: 11px system-ui, sans-serif; fill: #4b5563; } svg .title { font-size: 13px; fill: #111827; }
svg .grid { stroke: #f3f4f6; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f9fafb; padding: 1rem; overflow: auto; border-radius: 6px; white-space: pre-wrap; }
"""

MARK_COLOURS = {
    "spike": "#f59e0b",
    "skip": "#f59e0b",
    "rollback": "#dc2626",
    "lr_adjust": "#9333ea",
    "give_up": "#111827",
}
WATCHED = (
    ("update_rms", "size of the update", "largest root mean square of a tensor's change"),
    ("attention_logit", "largest attention logit", "on a sample of queries"),
)


class ReportHook(Hook):
    """Writes the page when the run ends, whatever the reason."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        write_report(self.folder)


def write_report(folder: Path) -> Path:
    """Make `report.html` from a run's folder: metrics, events, configuration, plan and sample, as far as they are there."""
    metrics = read_json_lines(folder / "metrics.jsonl")
    events = read_json_lines(folder / "events.jsonl")
    page = folder / "report.html"
    page.write_text(render(folder.name, metrics, events, _extras(folder)), encoding="utf-8")
    return page


def render(name: str, metrics: list[dict[str, Any]], events: list[dict[str, Any]], extras: dict[str, str]) -> str:
    """The page's text. `extras`: further sections, title to preformatted text."""
    metrics, abandoned = last_course(metrics)
    marks = [
        Mark(event["step"], event_text(event), MARK_COLOURS.get(event["kind"], "#6b7280"))
        for event in events
        if event["kind"] not in QUIET
    ]
    charts = "\n".join(f"<div>{chart.svg()}</div>" for chart in charts_of(metrics, marks, abandoned))
    sections = [f"<h2>{html.escape(title)}</h2><pre>{html.escape(text)}</pre>" for title, text in extras.items()]
    rows = "".join(
        f"<tr><th>{html.escape(label)}</th><td class=number>{html.escape(value)}</td></tr>"
        for label, value in summary(metrics).items()
    )
    happened = "".join(
        f"<tr><td class=number>{event['step']}</td><td>{html.escape(event['kind'])}</td>"
        f"<td>{html.escape(_details(event))}</td></tr>"
        for event in events
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(name)}</h1><table>{rows}</table><div class=charts>{charts}</div>"
        f"<h2>Events</h2><table><tr><th>step</th><th>event</th><th>details</th></tr>{happened}</table>"
        + "".join(sections)
        + "</html>\n"
    )


def charts_of(
    metrics: list[dict[str, Any]], marks: list[Mark], abandoned: Sequence[list[dict[str, Any]]] = ()
) -> list[Chart]:
    """Loss (with held-out loss), gradient norm, learning rate and throughput over steps; pale: what was gone back on."""

    def line(label: str, key: str) -> Line:
        held = [record for record in metrics if record.get(key) is not None]
        return Line(label, [record["step"] for record in held], [record[key] for record in held])

    def left(key: str) -> list[Line]:
        measured = [[record for record in stretch if record.get(key) is not None] for stretch in abandoned]
        return [Line("abandoned", [r["step"] for r in held], [r[key] for r in held], pale=True) for held in measured]

    losses, norms = [line("training", "loss"), line("held-out", "eval/loss")], [line("gradient norm", "grad_norm")]
    charts = [
        Chart("loss", "nats a token", losses + left("loss"), marks),
        Chart("gradient norm", "L2, before clipping", norms + left("grad_norm"), marks, log=True),
        Chart("learning rate", "per step", [line("learning rate", "lr")], marks),
        Chart("throughput", "tokens a second", [line("tokens/s", "tokens_per_s")], marks),
    ]
    sources = list(dict.fromkeys(key for record in metrics for key in record if key.startswith("loss/")))
    if sources:
        by_source = [line(key.removeprefix("loss/"), key) for key in sources]
        charts.insert(1, Chart("loss by source", "nats a token", by_source, marks))
    for key, title, unit in WATCHED:
        if any(record.get(key) is not None for record in metrics):
            charts.append(Chart(title, unit, [line(title, key), *left(key)], marks, log=True))
    if any(record.get("mfu") is not None for record in metrics):
        charts.append(
            Chart("utilisation", "of the matrix peak", [line("model", "mfu"), line("hardware", "hfu")], marks)
        )
    return charts


def summary(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """The run in a few numbers."""
    if not metrics:
        return {"steps": "0"}
    last = metrics[-1]
    evaluated = [record["eval/loss"] for record in metrics if record.get("eval/loss") is not None]
    times = sorted(record["step_time_s"] for record in metrics)
    numbers = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "first loss": f"{metrics[0]['loss']:.4f}",
        "last loss": f"{last['loss']:.4f}",
        "median step": f"{times[len(times) // 2]:.3f} s",
        "updates refused": str(sum(record["skipped"] for record in metrics)),
    }
    if evaluated:
        numbers["held-out loss"] = f"{evaluated[-1]:.4f}"
    return numbers


def _details(event: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "step", "kind"))


def _extras(folder: Path) -> dict[str, str]:
    sections = {}
    if (folder / "sample.txt").exists():
        sections["What the model writes"] = (folder / "sample.txt").read_text(encoding="utf-8")
    if (folder / "plan.json").exists():
        sections["Plan"] = json.dumps(json.loads((folder / "plan.json").read_text(encoding="utf-8")), indent=2)
    if (folder / "config.yaml").exists():
        sections["Configuration"] = (folder / "config.yaml").read_text(encoding="utf-8")
    return sections
