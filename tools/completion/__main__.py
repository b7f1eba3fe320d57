"""Command line of `megalm completion`."""

import sys
from collections.abc import Sequence

from megalm.__main__ import find_tools
from megalm.config.completion import list_words

from ..arguments import ArgumentParser
from ..subcommands import run_reporting

SHELLS = ("bash", "zsh")

SCRIPT = """\
# megalm: completion of commands, and of groups and keys behind `megalm train`. Made by `megalm completion {shell}`.
{prelude}_megalm() {{
  local typed="${{COMP_LINE:0:COMP_POINT}}" word
  word="${{typed##*[[:space:]]}}"
  local words
  if [[ "$typed" =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+[^[:space:]]*$ ]]; then
    words="{commands}"
  elif [[ "$typed" =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+train[[:space:]] ]]; then
    words="{words}"
  else
    COMPREPLY=($(compgen -f -- "$word"))
    return
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
  # The shell cuts words at "=": what stands before it is there already.
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    local before="${{word%"${{word##*=}}"}}" i
    for i in "${{!COMPREPLY[@]}}"; do COMPREPLY[i]="${{COMPREPLY[i]#"$before"}}"; done
  fi
}}
complete -F _megalm megalm
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input."""
    parser = ArgumentParser(prog="megalm completion", description=__doc__)
    parser.add_argument("shell", choices=SHELLS, help="to be sourced there: source <(megalm completion bash)")
    args = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    return run_reporting(lambda: run(args.shell))


def run(shell: str) -> int:
    """Print the script of a shell; zsh reads bash's."""
    prelude = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    commands = " ".join(sorted(["train", *find_tools()]))
    print(SCRIPT.format(shell=shell, prelude=prelude, commands=commands, words=" ".join(list_words())), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
