"""A save interrupted at every file operation, in every way; how many of the points recover."""

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from megalm.config.errors import ConfigError

HELP = "interrupt a two-rank save at every file operation (kill, power loss, full disk, I/O error, ...) and recover"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample", type=int, help="that many points instead of all")
    parser.add_argument("--seed", type=int, default=0, help="which points a sample takes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a CPU)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 only if every point recovered."""
    if shutil.which("gcc") is None:
        raise ConfigError("the fault library is compiled with gcc, which is not installed: apt install gcc.")
    from ._crash_points import enumerate_crashes

    report = asdict(enumerate_crashes(args.sample, args.seed, quiet=not sys.stderr.isatty(), jobs=args.jobs))
    report["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report))
    else:
        operations = sum(report["operations"].values())
        print(f"{operations} file operations in a save of two ranks: {_counts(report['operations'])}")
        print(f"{report['points']} points{' (a sample)' if report['sampled'] else ''}: {_counts(report['faults'])}")
        print(f"found afterwards: step N-1 {report['found_old']} times, step N {report['found_new']} times")
        print(f"recovered bitwise: {report['recovered']} of {report['points']} ({report['seconds']:.0f} s)")
        for failure in report["failures"]:
            print(f"NOT RECOVERED {failure}")
    return 0 if report["recovered"] == report["points"] else 1


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
