"""A run's life in one screen: how far it is, what happened, what it cost; follows one that goes on."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError, explain_missing_folder
from megalm.journal import QUIET, describe_event_details, read_events, read_steps
from megalm.journal.life import Life, tell_life

HELP = "a run's life in one screen: steps, restarts, what they cost, goodput, events; --follow: as it goes on"
LOOK_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, such as runs/first")
    parser.add_argument("--events", type=int, default=15, metavar="N", help="the last N events (15)")
    parser.add_argument("--follow", action="store_true", help="go on printing events until interrupted")
    parser.add_argument("--json", action="store_true", help="print the life as JSON")


def run(args: argparse.Namespace) -> int:
    """Print it. Errors: ConfigError where the folder is no run's."""
    if not (args.folder / "events.jsonl").is_file():
        if not args.folder.is_dir():
            raise explain_missing_folder(args.folder, "a run's folder such as runs/first")
        raise ConfigError(f"{args.folder} is no run's folder: there is no events.jsonl. Give one such as runs/first.")
    events, life = _read(args.folder)
    if args.json:
        print(json.dumps(asdict(life)))
        return 0
    print("\n".join(_show_life(args.folder, life)))
    shown = [event for event in events if event["kind"] not in QUIET]
    for event in shown[-args.events :] if args.events > 0 else []:
        print(_show_event(event))
    seen = len(events)
    while args.follow:
        time.sleep(LOOK_S)
        events, _ = _read(args.folder)
        for event in events[seen:]:
            print(_show_event(event), flush=True)
        seen = len(events)
    return 0


def _read(folder: Path) -> tuple[list[dict[str, Any]], Life]:
    metrics = folder / "metrics.jsonl"
    events = read_events(folder / "events.jsonl")
    return events, tell_life(events, read_steps(metrics) if metrics.exists() else [])


def _show_life(folder: Path, life: Life) -> list[str]:
    loss = "" if life.loss is None else f", loss {life.loss:.4f}"
    pace = "" if life.step_s is None else f", {life.step_s:.3g} s a step"
    durable = "no checkpoint" if life.durable is None else f"newest checkpoint: step {life.durable}"
    lines = [f"{folder}: step {life.step}{loss}{pace}; {durable}"]
    if life.ended:
        lines.append(f"it {life.ended}; the same command goes on")
    again = f"started {life.starts} time{'s' * (life.starts != 1)}, its ranks {life.restarts} times more"
    lines.append(f"{again}; {life.lost_steps} steps made again")
    if life.goodput is not None:
        lost = ", ".join(f"{name} {seconds:.1f}" for name, seconds in life.badput_s.items())
        lines.append(f"goodput {100 * life.goodput:.1f}%" + (f"; seconds lost: {lost}" if lost else ""))
    return lines


def _show_event(event: dict[str, Any]) -> str:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])) if "time" in event else ""
    words = event.get("reason") if event["kind"] == "give_up" else describe_event_details(event)
    return f"{clock}  step {event['step']:>7}  {event['kind']:<10} {words or ''}".rstrip()
