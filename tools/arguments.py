"""The parser of every tool: argparse, whose complaints become one sentence that names the way out.

`megalm generate runs/first --temprature 1` is answered with `--temperature`, a wrong subcommand with the nearest one,
and `max_tokens=5`, which is how `megalm train` takes its settings, with `--max-tokens 5`.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

WRONG = 2
"""Exit status of a command line that cannot be used."""

TYPES = {"int": "a whole number", "float": "a number", "Path": "a path"}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with errors for people. Subparsers are of this class, too."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.commands: Any = None

    def add_subparsers(self, **settings: Any) -> Any:
        """As argparse; remembered, so that what a subcommand did not understand is answered with its own options."""
        self.commands = super().add_subparsers(**settings)
        return self.commands

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse; a word that is left over is answered with the option that it was meant for."""
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            chosen = getattr(parsed, self.commands.dest, None) if self.commands is not None else None
            parser = self.commands.choices[chosen] if chosen is not None else self
            parser.refuse(parser.explain_unknown_word(left[0]))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print argparse's complaint in our words, and exit with 2."""
        self.refuse(self._explain(message))

    def refuse(self, sentence: str) -> NoReturn:
        """Print the sentence and exit with 2."""
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(WRONG)

    def list_options(self) -> list[str]:
        """List every option in its long form."""
        return [word for word in self._option_string_actions if word.startswith("--")]

    def explain_unknown_word(self, word: str) -> str:
        """Say what an unknown option, or one word too many, may have been meant for."""
        help_line = f"{self.prog} --help lists all."
        name, _, value = word.lstrip("-+~").partition("=")
        meant = f"--{name.replace('_', '-').replace('.', '-')}"
        if not word.startswith("-"):
            if "=" in word and meant in self.list_options():
                return f"{word}: here it is an option: {meant} {value}".rstrip() + "."
            place = "no more words are taken" if any(not a.option_strings for a in self._actions) else "not an option"
            return f"{word}: {place}; options begin with --. {help_line}"
        hint = suggest(meant, self.list_options())
        return f"{self.prog} has no option {word.partition('=')[0]}.{hint} {help_line}"

    def _explain(self, message: str) -> str:
        found = re.match(r"argument (?P<name>[^:]+): (?P<what>.*)", message, re.DOTALL)
        action = self._find_action(found["name"]) if found else None
        if found is not None and action is not None:
            return self._explain_argument(action, found["what"])
        missing = re.match(r"the following arguments are required: (.*)", message)
        if missing is not None:
            first = self._find_action(missing[1].split(", ")[0])
            text = f" ({first.help})" if first is not None and first.help and "%" not in first.help else ""
            if first is not None and first is self.commands:
                there = ", ".join(map(str, first.choices or ()))
                return f"{self.prog}: which? There are: {there}. {self.prog} --help tells more."
            return f"{self.prog}: give {missing[1].replace(', ', ' and ')}{text}. {self.prog} --help tells all."
        needed = re.match(r"one of the arguments (.*) is required", message)
        if needed is not None:
            return f"{self.prog}: give one of {', '.join(needed[1].split())}. {self.prog} --help tells what each does."
        ambiguous = re.match(r"ambiguous option: (\S+) could match (.*)", message)
        if ambiguous is not None:
            return f"{ambiguous[1]} may mean {ambiguous[2].replace(', ', ' or ')}: write it out."
        return f"{message}. {self.prog} --help tells more."

    def _explain_argument(self, action: argparse.Action, what: str) -> str:
        name = "/".join(action.option_strings[-1:]) or str(action.metavar or action.dest)
        invalid = re.match(r"invalid choice: '?(.*?)'? \(", what, re.DOTALL)
        if invalid is not None and action.choices is not None:
            choices = [str(choice) for choice in action.choices]
            hint = suggest(invalid[1], choices)
            if action is self.commands:
                return f"{self.prog} has no command {invalid[1]!r}.{hint} There are: {', '.join(choices)}."
            return f"{name} {invalid[1]}: not one of the choices.{hint} Choices: {', '.join(choices)}."
        wrong = re.match(r"invalid (\w+) value: '(.*)'", what, re.DOTALL)
        if wrong is not None:
            default = f" Without it: {action.default}." if action.default not in (None, [], False) else ""
            return f"{name} {wrong[2]}: must be {TYPES.get(wrong[1], 'a ' + wrong[1])}.{default}"
        if what.startswith("expected"):
            value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
            return f"{name}: its value is missing. Write {name} {value}; {self.prog} --help tells what it may be."
        other = re.match(r"not allowed with argument (.*)", what)
        if other is not None:
            return f"{name} and {other[1]}: give one of them."
        return f"{name}: {what}. {self.prog} --help tells more."

    def _find_action(self, name: str) -> argparse.Action | None:
        for action in self._actions:
            shown = "/".join(action.option_strings) or action.metavar or action.dest
            if name in (shown, action.dest, *action.option_strings):
                return action
        return None


def suggest(word: str, choices: Iterable[str]) -> str:
    """` Did you mean 'memory'?`, or nothing where no choice is near."""
    listed = list(choices)
    by_lower = {choice.lower(): choice for choice in listed}
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    begun = [choice for choice in listed if word and choice.lower().startswith(word.lower())]
    chosen = by_lower[near[0]] if near else begun[0] if len(begun) == 1 else None
    return f" Did you mean {chosen!r}?" if chosen is not None else ""
