"""A subcommand for each of the planner's answers: words on the command line, --json and --html."""

import argparse
from types import ModuleType

from megalm.plan.request import KEYS, parse


class AnswerCommand:
    """Asks one module of `megalm.plan.answers` what stands on the command line."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.name = module.__name__.rpartition(".")[2]
        self.HELP: str = module.HELP
        self.files: str | None = getattr(module, "FILES", None)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Words, output options and, below them, what each key means."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        lines = [f"  {key:<22} {KEYS[key][1]}" for key in self.module.KEYS]
        parser.epilog = "\n".join(
            ["keys (key=value; numbers may end in k, M, B or T):", *lines, "", "example:", f"  {self.module.EXAMPLE}"]
        )
        what = "launcher overrides (+model=7b model.num_layers=32 parallel.tensor=4 ...) and key=value of its own"
        parser.add_argument("words", nargs="*", metavar=self.files or "KEY=VALUE", help=what)
        parser.add_argument("--json", action="store_true", help="print JSON; keys carry their units")
        parser.add_argument("--html", metavar="FILE", help="also write a self-contained page with tables and plots")
        _words_first(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Parse, answer, print."""
        request = parse(self.name, args.words, self.module.KEYS, files=self.files is not None)
        return self.module.answer(request).show(as_json=args.json, page=args.html)


def _words_first(parser: argparse.ArgumentParser) -> None:
    """Let key=value words and options stand in any order: argparse takes positionals from one place only."""
    original = parser.parse_known_args

    def parse_known_args(args=None, namespace=None):  # type: ignore[no-untyped-def]
        given = list(args or [])
        words = [word for word in given if "=" in word and not word.startswith("-")]
        return original(words + [word for word in given if word not in words], namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
