"""Which product of which layer of a run computes in what, and its error on one batch."""

import argparse
import json
from pathlib import Path

HELP = "which product of which layer of a run computes in what, and its error on one batch"
PARTS = ("y", "worst row", "dx", "dW")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from megalm.observe.precision import look_at_precision

    found = look_at_precision(args.run)
    if args.json:
        print(json.dumps(found))
        return 0
    weights = f"the weights of step {found['step']}" if found["step"] else "initial weights"
    print(
        f"{found['run']}: {weights}; errors of 8-bit products against {found['dtype']}, norm of the difference over the norm"
    )
    width = max(len(row["product"]) for row in found["products"])
    print(f"\n{'product':{width}}  {'weight':>14}  {'runs in':12}" + "".join(f"  {part:>9}" for part in PARTS))
    for row in found["products"]:
        errors = "".join(f"  {row['errors'][part]:9.4f}" if part in row["errors"] else f"  {'-':>9}" for part in PARTS)
        print(f"{row['product']:{width}}  {row['rows']:>6} x {row['columns']:<5}  {row['runs_in']:12}{errors}")
    return 0
