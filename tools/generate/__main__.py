"""Lets a trained model go on from a text.

    python -m tools.generate runs/first --prompt "def train("
    python -m tools.generate SmolLM2-135M --prompt "The sea" --temperature 0.7 --top-p 0.95
    echo "Once upon a time" | python -m tools.generate runs/first

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
        "python -m tools.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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


def run(arguments: argparse.Namespace) -> int:
    from megalm.generate.generate import generate
    from megalm.generate.model import load_model, tokenizer_file
    from megalm.tokenizer.tokenizer import load_tokenizer

    for name, low, high in (("max_tokens", 1, None), ("temperature", 0, None), ("top_k", 0, None), ("top_p", 0, 1)):
        value = getattr(arguments, name)
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be {limit}")
    source, model = load_model(arguments.model, device=arguments.device, dtype=DTYPES[arguments.dtype])
    tokenizer = load_tokenizer(arguments.tokenizer or tokenizer_file(source))
    if tokenizer.vocab_size > source.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} words, the model {source.model.vocab_size}: "
            "give the model's own with --tokenizer"
        )
    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read().rstrip("\n")
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if start is None:
            raise ConfigError("the prompt is empty and the tokenizer has no token to begin a text with; give --prompt")
        ids = [start]
    stop = {tokenizer.eos_id} if tokenizer.eos_id is not None and not arguments.ignore_end else set()
    stream = Stream(tokenizer, ids, speak=not arguments.json)
    begun = time.perf_counter()
    written = generate(
        model,
        ids,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=stop,
        on_token=stream,
    )
    seconds = time.perf_counter() - begun
    stream.show(last=True)
    if arguments.json:
        text = tokenizer.decode([*ids, *written])
        print(
            json.dumps(
                {
                    "prompt": prompt,
                    "text": text,
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
