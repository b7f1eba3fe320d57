"""Lets a trained model go on from a text.

    megalm generate runs/first --prompt "def train("
    megalm generate SmolLM2-135M --prompt "The sea" --temperature 0.7 --top-p 0.95
    echo "Once upon a time" | megalm generate runs/first
    megalm generate runs/first --prompts prompts.jsonl --samples 4 > texts.jsonl

The model is the newest good checkpoint of a run, a checkpoint, a Hugging Face folder or a Megatron-LM checkpoint.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megalm.checkpoint.errors import CheckpointError
from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError

from ..arguments import ArgumentParser
from ..model_options import add_device_arguments, choose_device, read_dtype


def make_parser() -> argparse.ArgumentParser:
    made = ArgumentParser("megalm generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, help="a run's folder, a checkpoint, or a folder of another library's")
    made.add_argument("--prompt", help="the text to go on from (default: standard input)")
    made.add_argument("--max-tokens", type=int, default=160, help="most tokens to write (default 160)")
    made.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    made.add_argument("--top-k", type=int, default=0, help="only among the k likeliest tokens; 0: all (default)")
    made.add_argument(
        "--top-p", type=float, default=0.95, help="only among the likeliest tokens that hold this probability"
    )
    made.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default 0)")
    made.add_argument("--tokenizer", type=Path, help="tokenizer file (default: the model's own)")
    made.add_argument("--ignore-end", action="store_true", help="write on after the end-of-text token")
    made.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting of a Hugging Face config.json that is not known here, and that you know to be harmless",
    )
    add_device_arguments(made)
    made.add_argument("--json", action="store_true", help="print prompt, text, ids and speed as JSON")
    made.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    made.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='many prompts, a JSON object {"prompt": ...} a line; written together, printed as JSON lines in their order',
    )
    made.add_argument(
        "--samples", type=int, default=1, help="texts of each prompt, with the seeds from --seed on (default 1)"
    )
    made.add_argument("--rows", type=int, default=32, help="most texts written at once (default 32)")
    return made


def read_prompt() -> str:
    """Read the prompt from standard input. ConfigError where that is not text."""
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start + 1})") from None


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a JSON-lines file. ConfigError that names the line and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
            raise ConfigError(f'{path}, line {number}: needs a text under "prompt", as {{"prompt": "The sea"}}')
        prompts.append(found["prompt"])
    if not prompts:
        raise ConfigError(f'{path}: no prompts; a line each, as {{"prompt": "The sea"}}')
    return prompts


def run(arguments: argparse.Namespace) -> int:
    from megalm.generate.generate import tokenize_prompt
    from megalm.generate.model import load_model, open_tokenizer, stop_tokens
    from megalm.generate.sampling import Sampling
    from megalm.generate.text import check_stop, write_texts

    for option in ("max_tokens", "samples", "rows"):
        if (value := getattr(arguments, option)) < 1:
            raise ConfigError(f"--{option.replace('_', '-')}={value} must be at least 1")
    if not -(2**63) <= arguments.seed < 2**63 - arguments.samples:
        raise ConfigError(f"--seed={arguments.seed} must fit into 64 bits")
    if arguments.prompts is not None and arguments.prompt is not None:
        raise ConfigError("--prompt and --prompts: give one of them")
    check_stop(arguments.stop)
    settings = [
        Sampling(arguments.max_tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed + number)
        for number in range(arguments.samples)
    ]
    settings[0].check()
    many = arguments.prompts is not None
    texts = (
        read_prompts(arguments.prompts)
        if many
        else [arguments.prompt if arguments.prompt is not None else read_prompt()]
    )
    source, model = load_model(
        arguments.model,
        device=choose_device(arguments.device),
        dtype=read_dtype(arguments.dtype),
        accept=arguments.accept,
    )
    tokenizer = open_tokenizer(source, arguments.tokenizer)
    for note in (*source.notes, *tokenizer.control.doubts):
        print(f"note: {note}", file=sys.stderr)
    prompts = [tokenize_prompt(tokenizer, text) for text in texts]
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > source.model.seq_length:
        print(
            f"note: {'a' if many else 'the'} prompt has {longest} tokens, the model sees {source.model.seq_length}: "
            "its beginning is not seen",
            file=sys.stderr,
        )
    stop = frozenset() if arguments.ignore_end else stop_tokens(source, tokenizer)
    speak = not (many or arguments.json or arguments.samples > 1)
    shown = [tokenizer.decode(prompt.ids[prompt.added :]) for prompt in prompts]
    if speak:
        print(shown[0], end="", flush=True)
    begun = time.perf_counter()
    found = write_texts(
        model,
        tokenizer,
        [prompt.ids for prompt in prompts for _ in settings],
        settings * len(prompts),
        stop_tokens=stop,
        stop=arguments.stop,
        on_text=(lambda _, text: print(text, end="", flush=True)) if speak else None,
        rows=arguments.rows,
    )
    seconds = time.perf_counter() - begun
    tokens = sum(len(each.written.tokens) for each in found)
    if speak:
        print()
    for number, each in enumerate([] if speak else found):
        which = number // arguments.samples
        line = {
            "prompt": texts[which],
            "text": shown[which] + each.text,
            "tokens": each.written.tokens,
            "reason": each.written.reason,
            "seed": settings[number % arguments.samples].seed,
            "tokens_per_s": tokens / seconds,
            "step": source.step,
        }
        print(json.dumps(line) if many or arguments.json else line["text"])
    if sys.stderr.isatty():
        print(f"{tokens} tokens, {tokens / seconds:.1f} a second, step {source.step}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    escape_what_cannot_be_written()
    try:
        return run(make_parser().parse_args(argv))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
