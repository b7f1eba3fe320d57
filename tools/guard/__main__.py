"""Command line of `megalm guard`."""

import argparse
import json
import sys
from pathlib import Path

from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError
from megalm.guard.trial.curve import Alarm, Curve, list_alarms, read_curve
from megalm.journal import format_number
from megalm.observe.plot import draw_text_plot
from megalm.page.document import Block, Facts, Table, render_page
from megalm.page.plots import Line, Lines, Mark

from ..arguments import ArgumentParser

COLOUR_OF_ACTION = {"none": "#7d8894", "skip": "#c9a227", "rollback": "#c0392b"}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    escape_what_cannot_be_written()
    parser = ArgumentParser(prog="megalm guard", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    replay = commands.add_parser("replay", help="run the detector over a loss log and print its alarms")
    replay.add_argument("curve", metavar="CURVE", help="csv file with a header, or a run's metrics.jsonl")
    replay.add_argument("--column", default="loss", help="column to watch (default: loss)")
    replay.add_argument("--json", action="store_true", help="print one JSON object")
    replay.add_argument("--html", metavar="PAGE", help="also draw the curve with its alarms as a page for a browser")
    samples = commands.add_parser("samples", help="print the text of the samples of a step")
    samples.add_argument("run", metavar="RUN", help="folder of a run")
    samples.add_argument("--step", type=int, required=True, metavar="N", help="step whose batch to print")
    samples.add_argument("--characters", type=int, default=400, help="of each sample, 0: all (default: 400)")
    samples.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        return _replay(arguments) if arguments.command == "replay" else _samples(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _replay(arguments: argparse.Namespace) -> int:
    curve = read_curve(arguments.curve, arguments.column)
    found = list_alarms(curve)
    if arguments.html:
        _write_page(arguments.html, arguments.curve, arguments.column, curve, found)
    if arguments.json:
        print(json.dumps({"steps": len(curve.steps), "alarms": [alarm.as_dict() for alarm in found]}))
        return 0
    if sys.stdout.isatty():
        marks = [alarm.step for alarm in found]
        print(draw_text_plot(curve.points, abandoned=curve.abandoned, width=96, title=arguments.column, marks=marks))
    for alarm in found:
        print(
            f"step {alarm.step:>8}  {alarm.kind:<9}  {alarm.action:<8}"
            f"  z {format_number(alarm.z, '8.2f'):>8}  onset {alarm.onset}"
        )
    rollbacks = sum(alarm.action == "rollback" for alarm in found)
    skips = sum(alarm.action == "skip" for alarm in found)
    again = sum(map(len, curve.abandoned))
    made = f" ({again} more were made and gone back on)" if again else ""
    print(f"{len(curve.steps)} steps{made}: {len(found)} alarms, {rollbacks} rollbacks, {skips} refused updates")
    return 0


def _write_page(file: str, source: str, column: str, curve: Curve, found: list[Alarm]) -> None:
    text = "step {}: {} (z {}), onset {}: {}"
    marks = [
        Mark(
            alarm.step,
            f"{alarm.kind}: {alarm.action}",
            text.format(alarm.step, alarm.kind, format_number(alarm.z, ".1f"), alarm.onset, alarm.action),
            COLOUR_OF_ACTION[alarm.action],
        )
        for alarm in found
    ]
    lines = [Line(column, curve.points), *(Line("", stretch, pale=True) for stretch in curve.abandoned)]
    rows = [(str(a.step), a.kind, a.action, format_number(a.z, ".2f"), str(a.onset)) for a in found]
    blocks: list[Block] = [
        Facts({"steps": f"{len(curve.steps):,}", "alarms": str(len(found))}),
        Lines(column, "step", column, lines, marks=marks, height=360),
        Table("alarms", ("step", "kind", "action of the default policy", "z", "onset"), rows),
    ]
    try:
        Path(file).write_text(render_page(source, blocks), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written ({error.strerror}).") from None


def _samples(arguments: argparse.Namespace) -> int:
    from megalm.observe.samples import find_samples_of_step

    found = find_samples_of_step(Path(arguments.run), arguments.step)
    if arguments.json:
        print(json.dumps({"step": arguments.step, "samples": found}))
        return 0
    for sample in found:
        text = sample["text"]
        if arguments.characters and len(text) > arguments.characters:
            text = text[: arguments.characters] + " ..."
        print(f"--- {sample['source']}: document {sample['document']}, offset {sample['offset']}")
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
