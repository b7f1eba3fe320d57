"""events.jsonl: what happened in a run and what was decided, each on disk before it is acted on."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUIET = {"checkpoint", "start", "end", "observe"}
"""Kinds that tell of an undisturbed run: not shown on curves."""


_WORDS = {
    "onset": "onset {}",
    "cause": "cause {}",
    "to_step": "back to step {}",
    "what": "{}",
    "device": "on {}",
    "world_size": "ranks: {}",
    "torch": "torch {}",
    "name": "{}",
    "bytes": "{:,} bytes",
}
"""Fields of events that are told as they are."""


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


def event_text(event: dict[str, Any]) -> str:
    """An event for people: what it was, its onset and cause, what was measured, and what was done."""
    words = event_words(event)
    return f"{event['kind']} at step {event['step']}" + (f", {words}" if words else "")


def event_words(event: dict[str, Any]) -> str:
    """What `event_text` says after kind and step."""
    parts = []
    for key, text in _WORDS.items():
        if event.get(key) is not None and not (key == "what" and "text" in event):
            parts.append(text.format(event[key]))
    if event.get("expected") is not None and event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4f} where {event['expected']:.4f} was expected")
    if event.get("why"):
        parts.append(f"out of line: {', '.join(event['why'])}")
    if event.get("samples") and event["kind"] != "spike":
        first, last = event["samples"]
        parts.append(f"samples {first} to {last - 1} skipped")
    if event.get("lr_scale") not in (None, 1.0):
        parts.append(f"learning rate x {event['lr_scale']:g}")
    if event.get("seconds") is not None:
        parts.append(f"in {event['seconds']:.3g} s")
    if event.get("stall_s") is not None:
        parts.append(f"of which the step waited {event['stall_s']:.2g} s")
    parts += [
        event[key] for key in ("text", "reason") if isinstance(event.get(key), str) and event["kind"] != "give_up"
    ]
    return ", ".join(parts)


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
