"""Every fault in every phase of a run, started as a user starts it; or a fault by chance every so many seconds."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

HELP = "faults of ranks in every phase: what is found and recovered, how soon, and whether the losses stay bitwise the same"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ._runs import KINDS

    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="faults (default: all)")
    parser.add_argument("--worlds", action="store_true", help="instead: ranks that are lost for long and come back")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="instead: train so long with faults by chance")
    parser.add_argument("--mean", type=float, default=30.0, help="--soak: seconds between faults, on average (30)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 only if everything recovered."""
    from ._runs import soak, tabulate_faults, walk_worlds

    if args.soak:
        report = soak(args.soak, args.mean)
        good = report["given_up"] == 0
    elif args.worlds:
        report = walk_worlds()
        good = report["worlds"] == [4, 3, 1, 2, 4] and report["each_step_once"] and report["largest_difference"] < 1e-6
    else:
        report = tabulate_faults(args.kinds)
        good = all(row["recovered"] and row["same_losses"] for row in report["faults"])
    report["system"] = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report))
    elif args.soak:
        _show_soak(report)
    elif args.worlds:
        _show_worlds(report)
    else:
        _show_table(report)
    return 0 if good else 1


def _show_table(report: dict[str, Any]) -> None:
    print(f"{'fault':14} {'phase':9} {'found s':>8} {'recovered s':>12} {'lost steps':>10}  losses")
    for row in report["faults"]:
        back = (
            f"{row['recover_s']:12.2f} {row['lost_steps']:10}"
            if row["recover_s"] is not None
            else f"{'-':>12} {'-':>10}"
        )
        found = f"{row['detect_s']:8.2f}" if row["detect_s"] is not None else f"{'-':>8}"
        print(f"{row['kind']:14} {row['phase']:9} {found} {back}  {'the same' if row['same_losses'] else 'DIFFERENT'}"
              f"{'' if row['recovered'] else '  NOT RECOVERED'}")  # fmt: skip
    print(f"{sum(row['recovered'] for row in report['faults'])} of {len(report['faults'])} recovered")


def _show_worlds(report: dict[str, Any]) -> None:
    print(f"{'ranks':>5} {'from step':>9} {'lost steps':>10} {'seconds':>8}  places that are out")
    for row in report["restarts"]:
        out = ", ".join(map(str, row["excluded"])) or "none"
        print(f"{row['world_size']:5} {row['step']:9} {row['lost_steps']:10} {row['seconds']:8.2f}  {out}")
    print(f"{report['steps']} steps, losses within {report['largest_difference']:.1e} of one rank's")


def _show_soak(report: dict[str, Any]) -> None:
    print(f"{report['restarts']} restarts in {report['seconds']:.0f} s, {report['steps']} steps")
    print(f"goodput {100 * report['goodput']:.1f}%; the rest by cause, in seconds:")
    for name, seconds in report["badput_s"].items():
        print(f"  {name:8} {seconds:8.1f}")
