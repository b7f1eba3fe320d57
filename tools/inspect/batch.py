"""The text that a run saw at a step, and where each sample of it comes from."""

import argparse
import json
from pathlib import Path

HELP = "the text that a run saw at a step, and where each sample of it comes from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--step", type=int, required=True, help="which step, counted from 1")
    parser.add_argument("--rows", type=int, default=4, help="samples to print in full; 0: all (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all samples as JSON")


def run(args: argparse.Namespace) -> int:
    from megalm.observe.samples import look_at_step

    result = look_at_step(args.run, args.step)
    if args.json:
        print(json.dumps(result))
        return 0
    samples = result["samples"]
    verb, how = ("took", "") if result["recorded"] else ("will take", ", if nothing else is skipped before")
    print(f"{result['run']}: step {args.step} {verb} {len(samples)} samples{how}")
    for row in samples[: args.rows or None]:
        print(
            f"\n--- sample {row['position']} of the stream: {row['source']}, epoch {row['epoch']}, sample {row['sample']}, "
            f"document {row['document']} from its token {row['offset']} (byte {row['byte']}) ---"
        )
        print(row["text"])
    if args.rows and len(samples) > args.rows:
        print(f"\n... and {len(samples) - args.rows} more (--rows 0 shows all)")
    return 0
