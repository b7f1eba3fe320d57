"""The one command: `megalm train +model=tiny`, `megalm tokenize ...`, `megalm plan ...`; the same as `python -m megalm`.

`megalm train` is `python -m megalm.launch`. Every other word is a tool: a folder of `tools/`, which is installed as
`megalm.tools`, so that it hides no package `tools` of a user's and none hides it.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

TRAIN = "Train a model: the same as `python -m megalm.launch`."
CHECKOUT = Path(__file__).resolve().parent.parent
"""The repository's folder, where this is a checkout."""


def find_tools() -> dict[str, str]:
    """Name of each tool -> the first line of its docstring. Nothing is imported."""
    package = load_tools()
    if package is None:
        return {}
    helps = {}
    for file in sorted(Path(package).glob("*/__main__.py")):
        docstring = ast.get_docstring(ast.parse((file.parent / "__init__.py").read_text(encoding="utf-8"))) or ""
        helps[file.parent.name] = docstring.partition("\n")[0]
    return helps


def load_tools() -> str | None:
    """Import the package `megalm.tools` and return its folder: in a checkout it is `tools/` beside this package."""
    folder = CHECKOUT / "tools"
    if "megalm.tools" not in sys.modules and (folder / "subcommands.py").exists() and (CHECKOUT / "setup.py").exists():
        places = [str(folder)]
        spec = importlib.util.spec_from_file_location(
            "megalm.tools", folder / "__init__.py", submodule_search_locations=places
        )
        assert spec is not None and spec.loader is not None
        sys.modules["megalm.tools"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    try:
        package = importlib.import_module("megalm.tools")
    except ModuleNotFoundError:
        return None
    return next(iter(package.__path__), None)


def describe_usage(tools: dict[str, str]) -> str:
    """Describe what `megalm --help` prints."""
    width = max(len(name) for name in ("train", *tools))
    lines = [f"  {name:<{width}}  {text}" for name, text in {"train": TRAIN, **tools}.items()]
    return "\n".join(
        [
            "usage: megalm COMMAND ...",
            "",
            "Train large language models, from a laptop to thousands of GPUs.",
            "",
            *lines,
            "",
            "megalm COMMAND --help tells more. The version: megalm --version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 where there is no such command."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "train":
        return importlib.import_module("megalm.launch.__main__").main(rest)
    if command in ("--version", "-V"):
        from megalm import __version__

        print(f"megalm {__version__}")
        return 0
    tools = find_tools()
    if command in ("-h", "--help", "help"):
        print(describe_usage(tools))
        return 0
    if command not in tools:
        print(f"error: there is no command {command!r}{_nearest(command, tools)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"megalm.tools.{command}.__main__").main(rest)


def _nearest(command: str, tools: dict[str, str]) -> str:
    if "=" in command or command.startswith("+"):
        return f": to train, say megalm train {command} ..."
    if command.startswith("-"):
        return f": options stand behind a command. To train: megalm train +model=tiny. There are: {', '.join(['train', *tools])}."
    near = difflib.get_close_matches(command, ["train", *tools], n=1)
    return (f". Did you mean {near[0]!r}?" if near else ".") + f" There are: {', '.join(['train', *tools])}."


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
