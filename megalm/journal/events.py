"""events.jsonl: what happened in a run and what was decided, each on disk before it is acted on."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.journal.lines import AppendedFile, read_json_lines
from megalm.journal.numbers import json_text

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends one JSON object a line, flushed to the disk; on ranks other than the writer it does nothing.

    Listeners are told of an event once it is on the disk. They only show it: one that fails is logged, once, and neither
    keeps the others from hearing of it nor the writer, who is about to act, from acting.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._file = AppendedFile(path) if writes else None
        self.listeners: list[Listener] = []
        self._failed: list[Listener] = []

    def write(self, kind: str, *, step: int, **fields: Any) -> None:
        """Record an event of this kind at this step; returns when the disk has it."""
        if self._file is None:
            return
        event = {"time": time.time(), "step": step, "kind": kind, **fields}
        self._file.append(json_text(event), durable=True)
        for listener in self.listeners:
            self._tell(listener, event)

    def _tell(self, listener: Listener, event: dict[str, Any]) -> None:
        try:
            listener(event)
        except Exception:
            if listener not in self._failed:
                self._failed.append(listener)
                name = getattr(listener, "__qualname__", repr(listener))
                log.exception(
                    "%s cannot show an event (%s, step %s); the run goes on", name, event["kind"], event["step"]
                )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file: objects with a step and a kind."""
    return [
        event
        for event in read_json_lines(path)
        if isinstance(event.get("step"), int) and isinstance(event.get("kind"), str)
    ]
