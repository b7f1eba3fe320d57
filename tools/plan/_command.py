"""What the planner's subcommands share: words on the command line, --json and --html."""

import argparse
import importlib
from collections.abc import Sequence

from megalm.plan.request import KEYS, parse


class Command:
    """One subcommand: its answer is `megalm.plan.answers.NAME.answer(request)`."""

    def __init__(self, name: str, help: str, keys: Sequence[str], example: str, files: str | None = None) -> None:
        self.name, self.help, self.keys, self.example, self.files = name, help, keys, example, files

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Words, output options and, below them, what each key means."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        lines = [f"  {key:<22} {KEYS[key][1]}" for key in self.keys]
        parser.epilog = "\n".join(
            ["keys (key=value; numbers may end in k, M, B or T):", *lines, "", "example:", f"  {self.example}"]
        )
        what = "launcher overrides (+model=7b model.num_layers=32 parallel.tensor=4 ...) and key=value of its own"
        parser.add_argument("words", nargs="*", metavar="KEY=VALUE" if not self.files else self.files, help=what)
        parser.add_argument("--json", action="store_true", help="print JSON; keys carry their units")
        parser.add_argument("--html", metavar="FILE", help="also write a self-contained page with tables and plots")
        _words_first(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Parse, answer, print."""
        request = parse(self.name, args.words, self.keys, files=self.files is not None)
        answer = importlib.import_module(f"megalm.plan.answers.{self.name}").answer
        return answer(request).show(as_json=args.json, page=args.html)


def _words_first(parser: argparse.ArgumentParser) -> None:
    """Let key=value words and options stand in any order: argparse takes positionals from one place only."""
    original = parser.parse_known_args

    def parse_known_args(args=None, namespace=None):  # type: ignore[no-untyped-def]
        given = list(args or [])
        words = [word for word in given if "=" in word and not word.startswith("-")]
        return original(words + [word for word in given if word not in words], namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
