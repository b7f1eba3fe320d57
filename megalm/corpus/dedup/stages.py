"""Stages over an engine that an interrupted job need not do again: what each task returned is written down beside the
files that it left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.corpus.engine import Engine, LocalEngine
from megalm.corpus.shards import WorkFolder, hash_json


class Progress:
    """Told what happens; does nothing by itself."""

    def say(self, message: str) -> None:
        """A sentence on what begins now."""

    def start(self, stage: str, total: float) -> None:
        """A stage begins; `total` is of bytes of input, or of tasks."""

    def advance(self, amount: float) -> None:
        """So much of it is done."""

    def finish(self) -> None:
        """The stage is over."""


class Stages:
    """Runs stages one after another, their tasks in any order.

    A task's function leaves whole files or none, and returns what JSON can hold; the results stand in `folder/results`,
    one a line. With a `recipe`, a folder that an interrupted job of the same recipe left is gone on with: the same
    stages in the same order. `close` removes the folder.
    """

    def __init__(
        self,
        folder: str,
        engine: Engine | None = None,
        recipe: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ):
        self.engine, self.progress = engine or LocalEngine(1), progress or Progress()
        self._work = WorkFolder(folder, recipe)
        self.folder = self._work.path
        if self._work.kept:
            self.progress.say(f"going on with an interrupted run ({self.folder})")
        elif self._work.of_another:
            self.progress.say(
                f"{self.folder} is of another command, or the input has changed since: beginning from the start"
            )
        self._path = os.path.join(self.folder, "results")
        self._known, whole = _read(self._path)
        if os.path.exists(self._path):
            os.truncate(self._path, whole)  # a line that an interruption cut off
        self._stages = 0

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self._known)

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        stage: str,
        sizes: Sequence[float] | None = None,
    ) -> list[Any]:
        """The function of every task, in their order. `sizes`: how much each is of the whole, for the progress."""
        name = f"{self._stages}.{function.__name__}"
        self._stages += 1
        weights = sizes or [1.0] * len(tasks)
        found = {number: self._known[name, number] for number in range(len(tasks)) if (name, number) in self._known}
        missing = [_Numbered(number, function, tasks[number]) for number in range(len(tasks)) if number not in found]
        if not missing:
            return [found[number] for number in range(len(tasks))]
        self.progress.start(stage, sum(weights))
        self.progress.advance(sum(weights[number] for number in found))
        try:
            with open(self._path, "a", encoding="utf-8") as log:
                for number, result in self.engine.map(_call, missing):
                    line = json.dumps([name, number, result])
                    log.write(line + "\n")
                    log.flush()
                    found[number] = self._known[name, number] = json.loads(line)[2]  # as it is read later
                    self.progress.advance(weights[number])
        finally:
            self.progress.finish()
        return [found[number] for number in range(len(tasks))]

    def close(self, keep: bool = False) -> None:
        """Removes what the stages left; `keep`: not if there is something to go on with."""
        self._work.close(keep and self.begun)


def describe_recipe(command: str, options: dict[str, Any], files: Sequence[Any]) -> dict[str, Any]:
    """Describe all that decides what the stages leave: the command, its options, and the files by their stamps."""
    return {"format": 1, "command": command, "options": options, "files": hash_json(list(files))}


def _read(path: str) -> tuple[dict[tuple[str, int], Any], int]:
    """Read the results that are whole, and how many bytes they take."""
    known: dict[tuple[str, int], Any] = {}
    whole = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                name, number, result = json.loads(line)
                known[name, number] = result
                whole += len(line)
    except (OSError, ValueError):
        pass
    return known, whole


@dataclass(frozen=True)
class _Numbered:
    number: int
    function: Callable[[Any], Any]
    task: Any

    @property
    def label(self) -> str:
        return getattr(self.task, "label", f"part {self.number}")


def _call(numbered: _Numbered) -> tuple[int, Any]:
    return numbered.number, numbered.function(numbered.task)
