"""Draw a pipeline schedule and say what it costs."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.pipeline import draw
from megalm.pipeline.schedule import KINDS, build_schedule
from megalm.pipeline.simulate import Costs, Simulation, simulate

HELP = "draw a pipeline schedule; its bubble, memory and time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", default="1f1b", choices=[*KINDS, "all"], help="all: one line for each (default 1f1b)")
    parser.add_argument("--stages", type=int, default=4, help="pipeline ranks (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="micro-batches of a step (default 8)")
    parser.add_argument("--chunks", type=int, help="chunks of layers on each rank (default: the schedule's own)")
    parser.add_argument("--forward", type=float, default=1.0, help="time of a chunk's forward pass (default 1)")
    parser.add_argument("--input-gradient", type=float, default=1.0, help="time of its input-gradient (default 1)")
    parser.add_argument("--weight-gradient", type=float, default=1.0, help="time of its weight-gradient (default 1)")
    parser.add_argument("--communication", type=float, default=0.0, help="time of a transfer between ranks (default 0)")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="also write the picture as SVG")
    parser.add_argument("--json", action="store_true", help="print the schedule and its figures as JSON")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--width", type=int, help="cut lines at this width (default: the terminal's; piped: uncut)")


def run(args: argparse.Namespace) -> int:
    costs = Costs(args.forward, args.input_gradient, args.weight_gradient, args.communication)
    for name, value in (("--forward", costs.forward), ("--input-gradient", costs.input_gradient)):
        if value <= 0:
            raise ConfigError(f"{name}={value:g}: a pass takes time; give a positive number.")
    for name, value in (("--weight-gradient", costs.weight_gradient), ("--communication", costs.communication)):
        if value < 0:
            raise ConfigError(f"{name}={value:g}: must not be negative.")
    if args.kind == "all":
        return _compare(args, costs)
    simulation = simulate(build_schedule(args.kind, args.stages, args.microbatches, args.chunks), costs)
    if args.svg is not None:
        try:
            args.svg.write_text(draw.draw_svg(simulation), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--svg {args.svg}: cannot be written ({error.strerror}).") from error
    if args.json:
        print(json.dumps(simulation.to_json() | {"actions": simulation.schedule.to_json()["actions"]}))
        return 0
    terminal = sys.stdout.isatty()
    color = args.color == "always" or (args.color == "auto" and terminal and "NO_COLOR" not in os.environ)
    width = args.width or (shutil.get_terminal_size().columns if terminal else None)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(draw.draw_text(simulation, width=width, color=color, unicode=unicode))
    print()
    print(draw.summarize(simulation))
    return 0


def _compare(args: argparse.Namespace, costs: Costs) -> int:
    """All schedules side by side, on the same model: with chunks, a pass of one chunk takes its part of the time."""
    if args.svg is not None:
        raise ConfigError("--kind all draws no picture: choose one schedule for --svg.")
    simulations: list[Simulation] = []
    for kind in KINDS:
        schedule = build_schedule(kind, args.stages, args.microbatches, args.chunks if kind == "interleaved" else None)
        part = 1.0 / schedule.placement.chunks
        scaled = Costs(
            costs.forward * part, costs.input_gradient * part, costs.weight_gradient * part, costs.communication
        )
        simulations.append(simulate(schedule, scaled))
    if args.json:
        print(json.dumps([simulation.to_json() for simulation in simulations]))
        return 0
    print(f"{args.stages} ranks, {args.microbatches} micro-batches")
    print(f"{'schedule':<12} {'chunks':>6} {'time':>9} {'bubble':>8} {'waiting':>8} {'activations held':>17}")
    for s in simulations:
        print(
            f"{s.schedule.kind:<12} {s.schedule.placement.chunks:>6} {s.makespan:>9.6g} {s.bubble_fraction:>8.2%} "
            f"{s.waiting_fraction:>8.2%} {max(s.peak_micro_batches):>17g}"
        )
    return 0
