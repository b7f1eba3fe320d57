"""Command line of `megalm chat`.

    megalm chat runs/first                  in the terminal
    megalm chat SmolLM2-135M --web          a page on this machine, and OpenAI's endpoints behind the same port

A model that came with a chat template is asked by it; any other gets a plain transcript.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.checkpoint.errors import CheckpointError
from megalm.config.errors import ConfigError

from ..arguments import ArgumentParser
from ..model_options import add_device_arguments, choose_device, read_dtype
from ..subcommands import run_reporting

if TYPE_CHECKING:
    from megalm.generate.chat import Speaker
    from megalm.generate.sampling import Sampling

WORDS = "/again writes another answer, /clear forgets, /system TEXT, /quit; Ctrl-C stops an answer"


def make_parser() -> argparse.ArgumentParser:
    """Make the arguments."""
    made = ArgumentParser("megalm chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, help="a run's folder, a checkpoint, or a folder of another library's")
    made.add_argument("--web", action="store_true", help="serve a page and OpenAI's endpoints on 127.0.0.1")
    made.add_argument("--port", type=int, default=8765, help="of the page; 0: any that is free (default 8765)")
    made.add_argument("--system", help="what the system says before everything")
    made.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default 0.7)")
    made.add_argument("--top-p", type=float, default=0.95, help="among the likeliest tokens of this probability")
    made.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer (default 256)")
    made.add_argument("--seed", type=int, help="the same seed gives the same answers (default: any)")
    made.add_argument("--tokenizer", type=Path, help="tokenizer file (default: the model's own)")
    made.add_argument("--accept", action="append", default=[], metavar="KEY", help="a setting that may be passed over")
    add_device_arguments(made)
    return made


def load(args: argparse.Namespace) -> "Speaker":
    """Load the model that the arguments name."""
    from megalm.generate.chat import Speaker
    from megalm.generate.model import load_model, open_tokenizer

    try:
        source, model = load_model(
            args.model, device=choose_device(args.device), dtype=read_dtype(args.dtype), accept=args.accept
        )
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    tokenizer = open_tokenizer(source, args.tokenizer)
    for note in (*source.notes, *tokenizer.control.doubts):
        print(f"note: {note}", file=sys.stderr)
    return Speaker(source, model, tokenizer)


def serve(speaker: "Speaker", port: int) -> int:
    """Serve until interrupted."""
    from megalm.generate.server import ChatServer

    server = ChatServer(speaker, port)
    print(f"{speaker.name}: {server.address} (OpenAI's endpoints: {server.address}/v1); Ctrl-C ends", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()
    return 0


def talk(speaker: "Speaker", args: argparse.Namespace) -> int:
    """Read lines and answer them until the input ends."""
    from megalm.generate.sampling import Sampling

    template = "its chat template" if speaker.template.template else "a plain transcript (it has no chat template)"
    print(f"{speaker.name}, asked by {template}. {WORDS}", file=sys.stderr)
    system: str | None = args.system
    messages: list[dict[str, str]] = []
    seed = args.seed if args.seed is not None else time.time_ns() % 2**31
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line == "/clear":
            messages = []
            continue
        if line.startswith("/system"):
            system = line.removeprefix("/system").strip() or None
            continue
        if line == "/again":
            if not messages:
                continue
            messages.pop()
        elif line:
            messages.append({"role": "user", "content": line})
        else:
            continue
        before = [{"role": "system", "content": system}] if system else []
        seed += 1
        sampling = Sampling(args.max_tokens, args.temperature, 0, args.top_p, seed)
        messages.append({"role": "assistant", "content": _answer(speaker, [*before, *messages], sampling)})


def _answer(speaker: "Speaker", messages: list[dict[str, str]], sampling: "Sampling") -> str:
    """Write the answer as it comes; returns what came of it before an interruption."""
    said: list[str] = []

    def tell(_: int, text: str) -> None:
        shown = text if said else text.removeprefix(" ")
        said.append(shown)
        print(shown, end="", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        speaker.answer(messages, sampling, on_text=tell)
    print()
    return "".join(said)


def run(args: argparse.Namespace) -> int:
    """Talk, or serve. Errors: ConfigError for what is no model, and for settings that nothing is written with."""
    from megalm.generate.sampling import Sampling

    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens={args.max_tokens} must be at least 1")
    Sampling(args.max_tokens, args.temperature, 0, args.top_p, args.seed or 0).check()
    speaker = load(args)
    return serve(speaker, args.port) if args.web else talk(speaker, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    return run_reporting(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
