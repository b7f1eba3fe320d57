"""Asks models the same prompts and judges their answers."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megalm.config.writing import write_whole

HELP = "answers of models to the same prompts beside each other, judged by a reward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="folders of runs or models")
    parser.add_argument(
        "--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines with `prompt` and what the reward reads"
    )
    parser.add_argument(
        "--rewards", nargs="+", default=["exact"], metavar="NAME", help="as rollout.rewards has them (default: exact)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="if not the model's own")
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N", help="of an answer (default %(default)s)")
    parser.add_argument(
        "--sample", type=int, default=3, metavar="N", help="prompts of a file to show (default %(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write all answers as a page")
    parser.add_argument("--json", action="store_true", help="print scores and answers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the scores and some answers; write the page."""
    from megalm.plan.render import make_console, make_grid
    from megalm.posttrain.verify import render_verified, verify

    verified = verify(args.models, args.prompts, args.rewards, args.max_tokens, args.tokenizer)
    scores = verified.scores()
    if args.html is not None:
        write_whole(args.html, render_verified(verified, args.rewards))
    if args.json:
        answers = [
            {
                "prompt": prompt.text,
                "file": verified.files[prompt.file],
                "answers": {m: asdict(a[at]) for m, a in zip(verified.models, verified.answers, strict=True)},
            }
            for at, prompt in enumerate(verified.prompts)
        ]
        print(json.dumps({"scores": [asdict(score) for score in scores], "answers": answers}))
        return 0
    headers = ["model", "prompts", "count", "reward, %", "95%", "ended by itself, %"]
    rows = [
        [
            s.model,
            s.prompts,
            s.count,
            f"{100 * s.mean:.1f}",
            f"{100 * s.low:.0f} to {100 * s.high:.0f}",
            f"{100 * s.ended:.0f}",
        ]
        for s in scores
    ]
    make_console().print(make_grid("rewards", headers, rows))
    for number, file in enumerate(verified.files):
        shown = [at for at, prompt in enumerate(verified.prompts) if prompt.file == number][: args.sample]
        for at in shown:
            print(f"{file}: {verified.prompts[at].text}")
            for model, own in zip(verified.models, verified.answers, strict=True):
                print(f"    {model}: {own[at].text!r}{'' if own[at].reward > 0 else '  (not rewarded)'}")
    if args.html is not None:
        print(f"all answers: {args.html}")
    return 0
