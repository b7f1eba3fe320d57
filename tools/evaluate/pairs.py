"""Writes two models' answers for people to compare."""

import argparse
import json
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.evaluate.pairs import KEY, SHOWN, make_pairs, write_pairs
from megalm.evaluate.tasks.rows import read_rows
from megalm.generate.chat import Speaker
from megalm.generate.model import load_model, open_tokenizer
from megalm.generate.sampling import Sampling

HELP = "write two models' answers to a file of prompts as a blinded page on which people vote"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL", help="runs, checkpoints or other folders")
    parser.add_argument("--prompts", type=Path, required=True, help='JSON lines, {"prompt": text}')
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {KEY} and {SHOWN}")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of the pairs' order (default 0)")


def run(args: argparse.Namespace) -> int:
    """Errors: ConfigError for prompts or models that are none."""
    prompts = []
    for where, row in read_rows(args.prompts):
        if not isinstance(row.get("prompt"), str):
            raise ConfigError(f'{where}: needs a text under "prompt"')
        prompts.append(row["prompt"])
    prompts = list(dict.fromkeys(prompts))
    if not prompts:
        raise ConfigError(f"{args.prompts}: no prompts")
    sampling = Sampling(args.max_tokens, args.temperature, 0, 0.95, args.seed)
    sampling.check()
    answers = []
    for path in args.models:
        source, model = load_model(path)
        speaker = Speaker(source, model, open_tokenizer(source))
        asked = [speaker.prompt_of([{"role": "user", "content": prompt}], args.max_tokens) for prompt in prompts]
        written = speaker.write(asked, [sampling] * len(asked), speaker.template.stop)
        answers.append({prompt: one.text.strip() for prompt, one in zip(prompts, written, strict=True)})
    names = [str(path) for path in args.models]
    if names[0] == names[1]:
        raise ConfigError(f"{names[0]} is given twice; give two models")
    pairs = make_pairs(prompts, answers[0], answers[1], (names[0], names[1]), args.seed)
    write_pairs(args.output, pairs)
    print(json.dumps({"pairs": len(pairs), "page": str(args.output / SHOWN), "key": str(args.output / KEY)}))
    return 0
