"""What a checkpoint holds: step, tokens, layout, sizes, types, norms; whether it is whole; how two differ."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HELP = "what a checkpoint holds: step, tokens, layout, sizes, types, norms; whether it is whole; how two differ"

# Rows of a table before the rest is only counted; --all shows them.
ROWS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a checkpoint's folder, or a run's (then its newest)")
    parser.add_argument(
        "other",
        type=Path,
        nargs="?",
        help="a second one: show what differs (exit status 1 if anything of tensors or state)",
    )
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with its checksum")
    parser.add_argument("--optimizer", action="store_true", help="also the optimizer's tensors")
    parser.add_argument("--all", action="store_true", help=f"all rows, not the first {ROWS}")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from megalm.checkpoint.errors import CorruptCheckpointError
    from megalm.checkpoint.reader import CheckpointReader
    from megalm.checkpoint.summary import list_differences, list_state_differences, make_overview, summarize
    from megalm.checkpoint.verify import list_problems

    try:
        reader = CheckpointReader(args.path)
        result: dict[str, Any] = make_overview(reader)
        if args.verify:
            result["problems"] = list(list_problems(reader.source, reader.manifest))
            if result["problems"]:
                print(json.dumps(result) if args.json else "\n".join(result["problems"]), file=_stream(args))
                return 1
        if args.other is None:
            result["tensors"] = [asdict(row) for row in summarize(reader, optimizer=args.optimizer)]
        else:
            other = CheckpointReader(args.other)
            result["other"] = make_overview(other)
            result["differences"] = [asdict(row) for row in list_differences(reader, other, optimizer=args.optimizer)]
            states = reader.state(), other.state()
            configs = [state.pop("config", {}) for state in states]
            result["state_differences"] = list_state_differences(*states)
            result["config_differences"] = list_state_differences(*configs) if all(configs) else []
    except CorruptCheckpointError as error:
        print(f"error: damaged: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
    else:
        _print(result, None if args.all else ROWS)
    return 1 if result.get("differences") or result.get("state_differences") else 0


def _stream(args: argparse.Namespace):
    return sys.stdout if args.json else sys.stderr


def _print(result: dict[str, Any], rows: int | None) -> None:
    _print_overview(result)
    if "problems" in result:
        print("whole       every byte matches its checksum")
    if "other" in result:
        print()
        _print_overview(result["other"])
        _print_differences(result, rows)
    else:
        _table(
            ["tensor", "shape", "type", "norm", "largest", "not finite"],
            [
                [t["name"], "x".join(map(str, t["shape"])), t["dtype"], f"{t['norm']:.6g}", f"{t['largest']:.4g}"]
                + [str(t["nonfinite"] or "")]
                for t in result["tensors"]
            ],
            rows,
        )


def _print_overview(found: dict[str, Any]) -> None:
    axes = " ".join(f"{axis}={size}" for axis, size in found["layout"].items() if size > 1) or "one rank"
    tokens = f", {found['tokens']:,} tokens" if found["tokens"] is not None else ""
    print(found["path"])
    print(f"step        {found['step']:,}{tokens}")
    print(
        f"saved       {found['saved_at']} by megalm {found['versions'].get('megalm')}, torch {found['versions'].get('torch')}"
    )
    print(f"layout      {axes} (any other loads it)")
    print(
        f"weights     {found['parameters']:,} parameters, {', '.join(found['dtypes'])}, {_size(found['weight_bytes'])}"
    )
    print(f"optimizer   {_size(found['optimizer_bytes'])}")
    print(f"files       {len(found['files'])}, {_size(found['file_bytes'])}")


def _print_differences(result: dict[str, Any], rows: int | None) -> None:
    if not result["differences"] and not result["state_differences"]:
        print("\nthe same: every tensor bit by bit, and the state")
    elif result["differences"]:
        _table(
            ["tensor", "elements", "largest", "relative", ""],
            [
                [d["name"], f"{d['differing']:,}", f"{d['largest']:.3g}", f"{d['relative']:.3g}", d["note"]]
                for d in result["differences"]
            ],
            rows,
        )
    else:
        print("\ntensors: the same, bit by bit")
    for part, lines in (("state", result["state_differences"]), ("configuration", result["config_differences"])):
        if lines:
            print(f"\n{part}")
            print("\n".join(f"  {line}" for line in lines[:rows]))


def _table(header: list[str], body: list[list[str]], rows: int | None) -> None:
    shown = body[:rows]
    widths = [max(len(row[column]) for row in [header, *shown]) for column in range(len(header))]
    print()
    for row in [header, *shown]:
        cells = [c.ljust(w) if i < 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    if len(body) > len(shown):
        print(f"... and {len(body) - len(shown)} more (--all)")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
