"""Measures two checkouts by turns: the same command in each, old then new, round after round, and the ratio of every figure.

    python scripts/by_turns.py ../before . --rounds 3 -- tools.bench data tokenize --json

Each checkout needs its own compiled extension (`python setup.py build_ext --inplace`). A machine that slows down slows both
sides, so the ratios hold where single figures do not. Processor seconds of each command stand beside what it printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def list_figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value with its path, `rows.0.tokens_per_second`."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, float(value)
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from list_figures(inner, f"{name}.{key}" if name else str(key))


def find_json(text: str) -> Any:
    """The JSON value that a command printed, alone, or as its last lines behind others."""
    lines = text.splitlines()
    for start in range(len(lines)):
        if lines[start][:1] in ("{", "["):
            try:
                return json.loads("\n".join(lines[start:]))
            except ValueError:
                continue
    raise SystemExit(f"no JSON in what the command printed (has it --json?): {text[-400:]!r}")


def measure(checkout: Path, words: list[str]) -> dict[str, float]:
    """The figures of one run of `python -m words` in a checkout, and its processor seconds."""
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{checkout}: exit {done.returncode}: {done.stderr[-1200:]}")
    figures = dict(list_figures(find_json(done.stdout)))
    return {**figures, "processor_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def describe_environment(sides: dict[str, Path]) -> dict[str, Any]:
    """When, where, and the commit of each side (the folder's name where it is no checkout)."""
    environment: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": platform.machine()}
    environment |= {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    for side, checkout in sides.items():
        words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        environment[side] = commit or checkout.name
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="figures whose path holds this word")
    parser.add_argument("--output", type=Path, help="where to write all rounds as JSON")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if not words:
        parser.error("nothing to measure: name a module and its words behind --")
    sides = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side, checkout in sides.items():
            print(f"round {number + 1} of {arguments.rounds}: {side}", file=sys.stderr, flush=True)
            rounds[side].append(measure(checkout, words))
    names = [name for name in rounds["old"][0] if name in rounds["new"][0] and arguments.only in name]
    width = max((len(name) for name in names), default=6)
    print(f"{'figure':<{width}}  {'old':>12}  {'new':>12}  {'new / old':>9}  lowest to highest")
    for name in names:
        old, new = ([row[name] for row in rounds[side] if name in row] for side in sides)
        ratios = [b / a for a, b in zip(old, new, strict=False) if a]
        if ratios and set(old) != set(new):
            median = statistics.median(ratios)
            first, last = min(ratios), max(ratios)
            values = f"{statistics.median(old):12.5g}  {statistics.median(new):12.5g}  {median:9.3f}"
            print(f"{name:<{width}}  {values}  {first:.3f} to {last:.3f}")
    if arguments.output is not None:
        result = {"command": words, "environment": describe_environment(sides), "rounds": rounds}
        arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
