"""Writes two models' answers for people to compare."""

import argparse
import json
from collections.abc import Sequence
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
    parser.add_argument(
        "--prompts", type=Path, required=True, help='JSON lines, {"prompt": text} or {"turns": [text, ...]}'
    )
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {KEY} and {SHOWN}")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of the pairs' order (default 0)")


def read_conversations(path: Path) -> list[list[str]]:
    """Read what is asked, turn by turn; the same once. Errors: ConfigError that names the line"""
    found: dict[tuple[str, ...], None] = {}
    for where, row in read_rows(path):
        turns = row.get("turns", [row.get("prompt")])
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise ConfigError(f'{where}: needs a text under "prompt", or a list of texts under "turns"')
        found[tuple(turns)] = None
    if not found:
        raise ConfigError(f"{path}: no prompts")
    return [list(turns) for turns in found]


def join_turns(turns: Sequence[str], answers: Sequence[str] = ()) -> str:
    """What is asked as one text; with answers: them, and before each but the first the turn that it answers, quoted."""
    if not answers:
        return "\n\n".join(turns)
    quoted = ["", *("> " + turn.replace("\n", "\n> ") + "\n\n" for turn in turns[1:])]
    return "\n\n".join(quote + answer for quote, answer in zip(quoted, answers, strict=True))


def answer_all(speaker: Speaker, conversations: Sequence[Sequence[str]], sampling: Sampling) -> list[str]:
    """A model's answers to each conversation, all conversations' next turns together."""
    said: list[list[dict[str, str]]] = [[] for _ in conversations]
    for turn in range(max(map(len, conversations))):
        going = [n for n, turns in enumerate(conversations) if turn < len(turns)]
        for n in going:
            said[n].append({"role": "user", "content": conversations[n][turn]})
        asked = [speaker.prompt_of(said[n], sampling.max_tokens) for n in going]
        written = speaker.write(asked, [sampling] * len(asked), speaker.template.stop)
        for n, one in zip(going, written, strict=True):
            said[n].append({"role": "assistant", "content": one.text.strip()})
    answers = [[one["content"] for one in messages if one["role"] == "assistant"] for messages in said]
    return [join_turns(turns, own) for turns, own in zip(conversations, answers, strict=True)]


def run(args: argparse.Namespace) -> int:
    """Errors: ConfigError for prompts or models that are none."""
    conversations = read_conversations(args.prompts)
    sampling = Sampling(args.max_tokens, args.temperature, 0, 0.95, args.seed)
    sampling.check()
    answers = []
    for path in args.models:
        source, model = load_model(path)
        speaker = Speaker(source, model, open_tokenizer(source))
        answers.append(
            dict(zip(map(join_turns, conversations), answer_all(speaker, conversations, sampling), strict=True))
        )
    names = [str(path) for path in args.models]
    if names[0] == names[1]:
        raise ConfigError(f"{names[0]} is given twice; give two models")
    pairs = make_pairs(list(answers[0]), answers[0], answers[1], (names[0], names[1]), args.seed)
    write_pairs(args.output, pairs)
    print(json.dumps({"pairs": len(pairs), "page": str(args.output / SHOWN), "key": str(args.output / KEY)}))
    return 0
