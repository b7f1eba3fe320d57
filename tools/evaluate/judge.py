"""Lets a model judge two models' answers."""

import argparse
import json
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.evaluate.judge import Judge, judge_pairs
from megalm.evaluate.pairs import read_pairs

HELP = "let an OpenAI-compatible endpoint judge the answers that `pairs` wrote, in both orders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where megalm evaluate pairs wrote the pairs")
    parser.add_argument(
        "--endpoint", required=True, metavar="URL", help="such as http://127.0.0.1:8765/v1 (megalm chat --web)"
    )
    parser.add_argument("--model", required=True, help="the judge's name at the endpoint")
    parser.add_argument("--key", default="OPENAI_API_KEY", help="environment variable that holds the endpoint's key")
    parser.add_argument("--workers", type=int, default=4, help="requests at a time (default 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Errors: ConfigError where the endpoint stays away; what it said is kept."""
    if not args.endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint {args.endpoint}: must begin with http:// or https://")
    if args.workers < 1:
        raise ConfigError(f"--workers={args.workers} must be at least 1")
    judge = Judge(args.endpoint, args.model, args.folder / "judge.jsonl", args.key)
    found = judge_pairs(list(read_pairs(args.folder).values()), judge, workers=args.workers)
    told = {"judge": args.model, **found.as_dict(), "requests": judge.asked}
    told |= {"prompt_tokens": judge.prompt_tokens, "completion_tokens": judge.completion_tokens}
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    trial = ", ".join(f"{name} {share:.0%}" for name, share in found.trial.items())
    print(
        f"the judge itself, share right: {trial}; flips with the order: {found.flip_rate:.0%}; unread: {found.unread}"
    )
    print(f"{found.models[0]} against {found.models[1]}: {found.wins[0]} won, {found.wins[1]} lost, {found.ties} ties")
    print(f"95% interval of the share, ties half: {found.interval[0]:.1%} to {found.interval[1]:.1%}")
    if found.longer_won is not None:
        print(f"the longer answer won {found.longer_won:.0%} of the decided pairs")
    print(
        f"{judge.asked} requests now, {judge.prompt_tokens:,} + {judge.completion_tokens:,} tokens; the rest was kept"
    )
    return 0
