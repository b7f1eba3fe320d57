"""events.jsonl: what happened in a run and what was decided, each on disk before it is acted on."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class EventLog:
    """Appends one JSON object a line, flushed to the disk; on ranks other than the writer it does nothing."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8") if writes else None
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each event, once it is on the disk."""

    def write(self, kind: str, *, step: int, **fields: Any) -> None:
        """Record an event of this kind at this step; returns when the disk has it."""
        if self._file is None:
            return
        event = {"time": time.time(), "step": step, "kind": kind, **fields}
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of an events file; a last line cut off by a crash is left out."""
    return read_json_lines(path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that may end in the middle of a line."""
    if not path.exists():
        return []
    objects = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            objects.append(json.loads(line))
    return objects
