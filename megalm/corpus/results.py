"""What the data tools write: it is never written over an input, and never read as one where a folder or glob finds it.

A list of documents could be anybody's, so where its folder is searched it gets a mark, `.NAME.result`, which holds as
long as nobody changes the list; the folder in which an interrupted run waits is known by what lies in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.corpus.documents import Piece
from megalm.corpus.finding import is_work_folder

NAMED = 5  # files that a message names


@dataclass(frozen=True)
class Results:
    """What a command writes: files, and folders whose content it removes first. They need not be there yet."""

    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def refuse_inputs(self, paths: Iterable[str]) -> None:
        """Errors: ConfigError if a result would be written over a file of this machine that is read, by whatever name: a
        link, another spelling on a file system that takes it for the same."""
        files = {_identity(name): name for file in self.files for name in (file, f"{file}.partial")}
        files.pop(None, None)
        folders = [(os.path.realpath(folder), folder) for folder in self.folders]
        for path in filter(None, map(_on_this_machine, paths)):
            real, written = os.path.realpath(path), files.get(_identity(path))
            if written is not None:
                same = "" if os.path.abspath(written) == os.path.abspath(path) else f" (the same file as {path})"
                raise ConfigError(f"{written} is an input{same}: write the result to another file.")
            for inside, folder in folders:
                if os.path.commonpath((inside, real)) == inside:
                    raise ConfigError(
                        f"{path} is an input, and {folder} is where the result's parts are written and removed: write the "
                        "result to another place."
                    )

    def input_files(self, files: Sequence[Piece], say: Callable[[str], None] = lambda message: None) -> list[Piece]:
        """The files without what tools of this house wrote, unless an input names it itself; `say` is told.

        Errors: ConfigError if one of the others is a result of this command.
        """
        kept: list[Piece] = []
        own: list[Piece] = []
        for file in files:
            path, source = _on_this_machine(file.path), _on_this_machine(file.source)
            found = path and not (source and os.path.abspath(path) == os.path.abspath(source))
            (own if found and is_result(path) else kept).append(file)
        if own:
            names = ", ".join(file.path for file in own[:NAMED]) + (", ..." if len(own) > NAMED else "")
            say(f"{len(own)} files are results of this tool and are left out: {names} (name one itself to read it)")
        self.refuse_inputs(file.path for file in kept)
        return kept

    def mark(self, files: Sequence[Piece]) -> None:
        """Marks the files that were written where these, or the folders and globs that gave them, lie."""
        paths = filter(None, (_on_this_machine(file.path) for file in files))
        sources = filter(None, {_on_this_machine(file.source) for file in files})
        places = {os.path.realpath(os.path.dirname(path)) for path in paths}
        searched = [os.path.realpath(_fixed(item)) for item in sources]
        for path in self.files:
            folder = os.path.realpath(os.path.dirname(path))
            if folder in places or any(os.path.commonpath((place, folder)) == place for place in searched):
                _mark_of(path).write_text(json.dumps(_stamp(path)))


def _on_this_machine(path: str) -> str:
    """The path of a file that is read without a store; empty for one in a store."""
    scheme, separator, rest = path.partition("://")
    return path if not separator else rest if scheme in ("file", "local") else ""


def _identity(path: str) -> tuple[int, int] | None:
    """What is the same for all names of a file; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _fixed(item: str) -> str:
    """The folder that a folder or glob searches."""
    while any(character in item for character in "*?["):
        item = os.path.dirname(item)
    return item or "."


def _mark_of(path: str) -> Path:
    return Path(os.path.dirname(path), f".{os.path.basename(path)}.result")


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def is_result(path: str) -> bool:
    """Whether a tool of this house wrote this list, and nobody changed it since; or the file waits for a result."""
    path = os.path.abspath(path)
    if _in_work_folder(os.path.dirname(path)):
        return True
    try:
        return json.loads(_mark_of(path).read_text()) == _stamp(path)
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=1 << 12)
def _in_work_folder(folder: str) -> bool:
    above = os.path.dirname(folder)
    return is_work_folder(folder) or (above != folder and _in_work_folder(above))
