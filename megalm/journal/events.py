"""events.jsonl: what happened in a run and what was decided, each on disk before it is acted on."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.journal.lines import AppendedFile, Row, read_json_lines
from megalm.journal.numbers import encode_json

log = logging.getLogger(__name__)

Listener = Callable[[Row], None]


class EventLog:
    """Appends one JSON object a line, flushed to the disk; on ranks other than the writer it does nothing.

    Listeners are told of an event once it is on the disk. They only show it: one that fails is logged, once, and neither
    keeps the others from hearing of it nor the writer, who is about to act, from acting. The same holds for a disk that
    takes nothing: the listeners hear of that, and the event is written when it does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._file = AppendedFile(path) if writes else None
        self.size_at_opening = path.stat().st_size if writes else 0
        """Bytes that a former process wrote, on the rank that writes."""
        self.listeners: list[Listener] = []
        self._failed: list[Listener] = []
        self._on_disk = True

    def write(self, kind: str, *, step: int, **fields: Any) -> None:
        """Record an event of this kind at this step; returns when the disk has it."""
        if self._file is None:
            return
        event = {"time": time.time(), "step": step, "kind": kind, **fields}
        was_on_disk, self._on_disk = self._on_disk, self._file.append(encode_json(event), durable=True)
        if was_on_disk and not self._on_disk:
            text = f"{self.path} cannot be written: is the disk full? Its lines are kept until it can"
            self._tell({"time": event["time"], "step": step, "kind": "warning", "what": "events", "text": text})
        self._tell(event)

    def _tell(self, event: Row) -> None:
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                if listener not in self._failed:
                    self._failed.append(listener)
                    name = getattr(listener, "__qualname__", repr(listener))
                    what = f"{event['kind']} at step {event['step']}"
                    log.exception("%s cannot show an event (%s); the run goes on", name, what)

    def close(self) -> None:
        """Close the file; later events are not recorded."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(path: Path) -> list[Row]:
    """Read all events of a file; each has a step and a kind."""
    return read_json_lines(
        path, lambda event: isinstance(event.get("step"), int) and isinstance(event.get("kind"), str)
    )
