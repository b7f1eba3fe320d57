"""Looks for faults in instruction data and in pairs of answers."""

import argparse
import json

from megalm.config.errors import ConfigError
from megalm.posttrain.lint import lint_files
from megalm.posttrain.prepare import find_template
from megalm.posttrain.render import Renderer
from megalm.tokenizer.tokenizer import load_tokenizer

HELP = "look for faults in records: repeated, broken, out of order, declining, cut; pairs that length decides"
SHOWN = 5
"""Places of a fault that are named on the screen; --json has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="+", help=".jsonl (compressed or not), .json or .parquet: records, or pairs of answers"
    )
    parser.add_argument("--tokenizer", help="also render each record with this model's tokenizer and chat template")
    parser.add_argument("--template", metavar="FILE", help="a chat template (Jinja) in place of the tokenizer's own")
    parser.add_argument("--json", action="store_true", help="print all places as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings. Exit status 0, also where there are some."""
    renderer = None
    if args.template is not None and args.tokenizer is None:
        raise ConfigError("--template is rendered with a tokenizer: give --tokenizer, too.")
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
        renderer = Renderer(find_template(tokenizer, args.template), tokenizer)
    linted = lint_files(args.file, renderer)
    if args.json:
        print(json.dumps(linted.as_dict(), indent=1))
        return 0
    pairs = f", {linted.pairs:,} of them pairs" if linted.pairs else ""
    print(f"{linted.records:,} records{pairs}" + ("" if linted.findings else ": nothing found"))
    if linted.kinds:
        counted = ", ".join(f"{count:,.0f} x {kind.replace('_', ' ')}" for kind, count in linted.kinds.items())
        print(f"  made by people: ${linted.dollars:,.0f} ({counted}; prices of `megalm plan cost`)")
    for finding in linted.findings:
        print(f"  {finding.check:<30} {finding.text}")
        for place in finding.places[:SHOWN]:
            print(f"    {place}")
        if len(finding.places) > SHOWN:
            print(f"    and {len(finding.places) - SHOWN:,} more: --json lists them")
    return 0
