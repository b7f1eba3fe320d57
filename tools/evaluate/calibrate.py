"""Says which tasks to trust at which size."""

import argparse
import json
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.evaluate.calibrate import TRUSTED, calibrate, read_run
from megalm.evaluate.tasks.suite import DATA, read_suite
from megalm.observe.runs import find_runs

HELP = "signal, noise and their ratio for each task and size, from the runs of a scaling ladder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", type=Path, help="folders of runs, or folders that hold runs")
    parser.add_argument("--suite", help="the suite that they were asked, for its chances")
    parser.add_argument("--data", type=Path, default=DATA, help=f"where fetched sets lie (default {DATA})")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    """Errors: ConfigError for what is no run, or was asked nothing."""
    runs = [read_run(Path(folder)) for folder in find_runs(args.run)]
    if not runs:
        raise ConfigError("there is no run in these folders")
    chances = {}
    if args.suite:
        tasks = read_suite(args.suite, args.data).tasks
        chances = {task.name: task.baseline() for task in tasks if task.kind in ("choice", "schema")}
    found = calibrate(runs, chances)
    if args.json:
        print(json.dumps([one.as_dict() for one in found], indent=2))
        return 0

    def show(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    print(
        f"{'parameters':>12} {'runs':>4}  {'figure':<34} {'mean':>8} {'signal':>8} {'noise':>8} {'ratio':>7} {'above chance':>12}"
    )
    for one in sorted(found, key=lambda one: (one.parameters, -(one.ratio or 0))):
        mark = {True: "trust", False: "", None: "?"}[one.trusted]
        above = "-" if one.above_chance is None else f"{one.above_chance:.1f} SE"
        print(
            f"{one.parameters:>12,} {one.runs:>4}  {one.figure:<34} {show(one.mean):>8} {show(one.signal):>8} "
            f"{show(one.noise):>8} {show(one.ratio, '.1f'):>7} {above:>12}  {mark}"
        )
    print(f"\ntrust: the runs of a size differ by {TRUSTED:g} times what one run's last figures move by; ?: too few")
    return 0
