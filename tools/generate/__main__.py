"""Lets a trained model go on from a text.

    megalm generate runs/first --prompt "def train("
    megalm generate SmolLM2-135M --prompt "The sea" --temperature 0.7 --top-p 0.95
    echo "Once upon a time" | megalm generate runs/first

The model is the newest good checkpoint of a run, a checkpoint, a Hugging Face folder or a Megatron-LM checkpoint.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megalm.checkpoint.errors import CheckpointError
from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "megalm generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    made.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU where there is one"
    )
    made.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="number format to compute in (default float32)"
    )
    made.add_argument("--json", action="store_true", help="print prompt, text, ids and speed as JSON")
    return made


class Stream:
    """Prints text as its tokens come; a character whose bytes are spread over tokens is held back until it is whole."""

    def __init__(self, tokenizer, ids: Sequence[int], speak: bool):
        self.tokenizer, self.ids, self.speak = tokenizer, [int(token) for token in ids], speak
        self.shown = ""
        self.show()

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        self.show()

    def show(self, last: bool = False) -> None:
        text = self.tokenizer.decode(self.ids)
        if (last or not text.endswith("\N{REPLACEMENT CHARACTER}")) and text.startswith(self.shown):
            if self.speak:
                print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def read_prompt() -> str:
    """The prompt from standard input. ConfigError where that is not text."""
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start + 1})") from None


def run(arguments: argparse.Namespace) -> int:
    from megalm.generate.generate import check_sampling, generate, prompt_ids
    from megalm.generate.model import load_model, stop_tokens, tokenizer_of

    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens={arguments.max_tokens} must be at least 1")
    if not -(2**63) <= arguments.seed < 2**63:
        raise ConfigError(f"--seed={arguments.seed} must fit into 64 bits")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    text = arguments.prompt if arguments.prompt is not None else read_prompt()
    source, model = load_model(
        arguments.model, device=arguments.device, dtype=DTYPES[arguments.dtype], accept=arguments.accept
    )
    tokenizer = tokenizer_of(source, arguments.tokenizer)
    for note in (*source.notes, *tokenizer.control.doubts):
        print(f"note: {note}", file=sys.stderr)
    prompt = prompt_ids(tokenizer, text)
    if len(prompt.ids) > source.model.seq_length:
        print(
            f"note: the prompt has {len(prompt.ids)} tokens, the model sees {source.model.seq_length}: its beginning is not seen",
            file=sys.stderr,
        )
    stop = frozenset() if arguments.ignore_end else stop_tokens(source, tokenizer)
    ids = prompt.ids[prompt.added :]
    stream = Stream(tokenizer, ids, speak=not arguments.json)
    begun = time.perf_counter()
    written = generate(
        model,
        prompt.ids,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=stop,
        never=tokenizer.unknown_ids(source.model.vocab_size),
        on_token=stream,
    )
    seconds = time.perf_counter() - begun
    stream.show(last=True)
    if arguments.json:
        print(
            json.dumps(
                {
                    "prompt": text,
                    "text": tokenizer.decode([*ids, *written]),
                    "tokens": written,
                    "tokens_per_s": len(written) / seconds,
                    "step": source.step,
                }
            )
        )
    else:
        print()
        if sys.stderr.isatty():
            print(f"{len(written)} tokens, {len(written) / seconds:.1f} a second, step {source.step}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    escape_what_cannot_be_written()
    try:
        return run(parser().parse_args(argv))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
