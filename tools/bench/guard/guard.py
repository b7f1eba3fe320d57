"""The guard measured: false rollbacks and detection on loss curves beside published rules; recoveries from real damage."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.journal import encode_json, format_number

HELP = "the guard: detection on curves beside published rules, real damage repaired, cost of a step (about 25 minutes)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detection", action="store_true", help="only the tables of detection on loss curves")
    parser.add_argument("--provoked", action="store_true", help="only the real runs that are damaged on purpose")
    parser.add_argument("--cost", action="store_true", help="only the step time with the guard and without")
    parser.add_argument("--curves", type=Path, metavar="FOLDER", help="folder of csv curves (default: synthetic ones)")
    parser.add_argument(
        "--tuned", default="", metavar="A,B", help="parts of names of curves that thresholds were chosen on, told apart"
    )
    parser.add_argument("--places", type=int, default=3, help="places of each injection in each curve (default 3)")
    parser.add_argument("--seeds", type=int, default=5, help="provoked: seeds of each recipe (default 5)")
    parser.add_argument("--recipes", default="", metavar="A,B", help="provoked: only these (default: all)")
    parser.add_argument(
        "--no-layouts", action="store_true", help="provoked: do not repeat recipes with dp=2, tp=2, pp=2"
    )
    parser.add_argument(
        "--attached", action="store_true",
        help="provoked: start each run as a user does, with console, TensorBoard and report attached",
    )  # fmt: skip
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="provoked: runs at a time (default: the cores)",
    )
    parser.add_argument("--data", default="data/python", help="provoked, cost: tokenized data (default data/python)")
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file, kept up to date as they come")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from . import _cost as _guard_cost
    from . import _recipes as _guard_recipes

    if args.seeds < 1 or args.jobs < 1:
        raise ConfigError(f"--seeds {args.seeds}, --jobs {args.jobs}: each must be 1 or more.")
    everything = not (args.detection or args.provoked or args.cost)
    result: dict[str, Any] = {}
    status = 0

    def show(text: str) -> None:
        _write(args.out, result)
        if not args.json:
            print(text, flush=True)

    def progress(part: dict[str, Any]) -> None:
        result["provoked"] = part
        _write(args.out, result)
        if part["provoked"] and sys.stderr.isatty():
            last = part["provoked"][-1]
            print(
                f"  {last['recipe']}, seed {last['seed']}: {last['verdict']}, {format_number(last['regret'], '+.4f')}",
                file=sys.stderr,
            )

    if everything or args.detection:
        result["detection"] = _curves(args)
        show(_tables(result["detection"]))
    if everything or args.cost:
        result["cost"] = _guard_cost.measure_costs(args.data)
        show("\n" + _guard_cost.write_cost_tables(result["cost"]))
    if everything or args.provoked:
        names = [name for name in args.recipes.split(",") if name]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _guard_recipes.run_recipes(
                names, args.seeds, args.data, jobs=args.jobs, layouts=not args.no_layouts, report=progress,
                attached=args.attached,
            )  # fmt: skip
        except KeyboardInterrupt:
            status = 130  # what is done is done
        if "provoked" in result:
            show("\n" + _guard_recipes.write_recipe_tables(result["provoked"]))
    if args.json:
        print(encode_json(result))
    return status


def _write(path: Path | None, result: dict[str, Any]) -> None:
    """The whole result so far, or none of it."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.write_text(encode_json(result, indent=1) + "\n")
    os.replace(aside, path)


def _curves(args: argparse.Namespace) -> dict[str, Any]:
    from megalm.guard.trial.baselines import RULES
    from megalm.guard.trial.trial import (
        count_false_alarms,
        load_traces,
        make_synthetic_traces,
        measure_detection,
        observe_microseconds,
        try_provoked,
        try_sampled,
    )

    if args.curves is not None and not args.curves.is_dir():
        raise ConfigError(f"--curves {args.curves}: there is no such folder.")
    traces = load_traces(args.curves) if args.curves else make_synthetic_traces()
    marks = [mark for mark in args.tuned.split(",") if mark]
    healthy = [t for t in traces if t.kind == "healthy"]
    groups = {
        "tuned": [t for t in healthy if any(mark in t.name for mark in marks)],
        "held out": [t for t in healthy if not any(mark in t.name for mark in marks)],
    }
    result: dict[str, Any] = {"curves": "recorded" if args.curves else "synthetic", "places": args.places, "groups": {}}
    for name, group in groups.items():
        if not group:
            continue
        rules = {
            rule: {**count_false_alarms(make, group), **measure_detection(make, group, args.places)}
            for rule, make in RULES.items()
        }
        result["groups"][name] = {"curves": [t.name for t in group], "rules": rules}
    if some := [t for t in traces if t.kind == "sampled"]:
        result["sampled"] = try_sampled(some)
    if some := [t for t in traces if t.kind == "provoked"]:
        result["provoked_curves"] = try_provoked(some)
    result["observe_us"] = observe_microseconds(healthy or traces)
    return result


def _tables(result: dict[str, Any]) -> str:
    lines = []
    for name, group in result["groups"].items():
        steps = next(iter(group["rules"].values()))["steps"]
        lines += ["", f"{name}: {len(group['curves'])} {result['curves']} curves, {steps:,} steps", ""]
        lines.append(
            f"{'':<18}{'rollbacks/100k':>16}{'(95% bound)':>13}{'refused/10k':>13}{'NaN at once':>13}{'next ok':>9}"
        )
        for rule, row in group["rules"].items():
            lines.append(
                f"{rule:<18}{row['rollbacks_per_100k']:>16.2f}{row['rollbacks_per_100k_95_bound']:>13.2f}"
                f"{row['refused_per_10k']:>13.1f}{row['nan_flagged']:>13.0%}{row['next_step_as_ever']:>9.0%}"
            )
        lines += ["", "rolled back, median delay, within 12 and 40 steps (the last four should never be):"]
        injections = next(iter(group["rules"].values()))["injections"]
        for injection in injections:
            lines.append(f"  {injection}")
            for rule, row in group["rules"].items():
                one = row["injections"][injection]
                delay = "-" if one["median_delay"] is None else one["median_delay"]
                lines.append(
                    f"    {rule:<18}{one['rolled_back']:>6.0%}  delay {delay!s:>4}  "
                    f"within 12 {one['within_12']:>5.0%}  within 40 {one['within_40']:>5.0%}"
                )
    if "sampled" in result:
        s = result["sampled"]
        lines += ["", f"sampled curves: {s['curves']}, {s['samples']:,} samples; sustained jumps of 0.4 in ln(loss): "]
        lines[-1] += f"{s['caught']} of {s['jumps']} caught; {s['rollbacks']} rollbacks in all"
    if "provoked_curves" in result:
        lines += ["", f"{'provoked curve':<26}{'event':>7}{'rollback after':>16}{'before':>8}{'refused':>9}"]
        for row in result["provoked_curves"]:
            event, delay = ("-" if row[key] is None else str(row[key]) for key in ("event", "delay"))
            lines.append(f"{row['curve']:<26}{event:>7}{delay:>16}{row['rollbacks_before']:>8}{row['refused']:>9}")
    lines += ["", f"one observation costs {result['observe_us']:.0f} us"]
    return "\n".join(lines)
