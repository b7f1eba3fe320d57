"""Makes instruction data ready to train on."""

import argparse
import json
import sys
from dataclasses import asdict

from megalm.posttrain.prepare import Prepared, prepare

HELP = "conversations, prompts with completions, texts, pairs of answers: into token files that say what is learned"
SHOWN = 10
"""Records left out that are named on the screen; --json has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="+", help=".jsonl (compressed or not), .json or .parquet, with messages, conversations, "
                                                "prompt and completion, text, or prompt with chosen and rejected")  # fmt: skip
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json, or the folder that holds it")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the files that are written")
    parser.add_argument("--template", metavar="FILE", help="a chat template (Jinja) in place of the tokenizer's own")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="longer records lose their end")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out and list records that cannot be learned from"
    )
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")


def run(args: argparse.Namespace) -> int:
    """Prepare the files, and say what they hold and how to train on them."""
    made = prepare(
        args.file,
        args.tokenizer,
        args.output,
        template_file=args.template,
        max_length=args.max_length,
        skip_bad=args.skip_bad,
        progress=_show_progress,
    )
    if args.json:
        print(json.dumps(asdict(made), indent=1))
        return 0
    print(describe(made, args.tokenizer))
    return 0


def _show_progress(records: int) -> None:
    if records % 10_000 == 0:
        print(f"{records:,} records", file=sys.stderr)


def describe(made: Prepared, tokenizer: str) -> str:
    """Describe what was made, and the next command."""
    share = made.targets / made.tokens
    things, experiment = ("pairs", "dpo") if made.pairs else ("records", "sft")
    lines = [
        f"{made.prefix}: {made.records:,} {things}{' (made before, of the same)' if made.reused else ''}",
        f"tokens      {made.tokens:,}, of which {made.targets:,} are learned ({share:.0%})",
        f"template    {made.template}",
        f"longest     {made.longest:,} tokens: choose model.seq_length not below it"
        + (", since both answers of a pair share a sample" if made.pairs else ", or records are cut into pieces"),
    ]
    if made.pairs:
        lines.append(
            f"length      the chosen answer is the longer one in {made.longer / made.records:.0%} of the pairs"
        )
    if made.cut:
        lines.append(f"cut         {made.cut:,} records lost their end")
    if made.left_out:
        lines.append(f"left out    {len(made.left_out):,} records")
        lines += [f"  {reason}" for reason in made.left_out[:SHOWN]]
        lines += [f"  and {len(made.left_out) - SHOWN:,} more: --json lists them"] if len(made.left_out) > SHOWN else []
    lines.append(
        f"train       megalm train +model=MODEL +experiment={experiment} data.train=[{made.prefix}] data.tokenizer={tokenizer} "
        "checkpoint.load=weights checkpoint.load_path=RUN train.steps=N"
    )
    return "\n".join(lines)
