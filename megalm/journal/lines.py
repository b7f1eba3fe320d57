"""Files of one JSON object a line that grow while a run goes on: appended to, and read whatever a crash left in them.

What a crash, a full disk or a power cut can leave, and what becomes of it:

    a last line without its end      read if it is whole, left out in silence if it is not; the writer removes it
    a torn line before a good one    the good one is read, also where it stands behind the torn text; the torn one is told
    zero bytes                       as if they were not there
    half a character, other damage   the line is left out and told, once in a process, with its number
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_told: set[tuple[str, int, bytes]] = set()
"""Damage that this process has told of: file, line, and its text."""


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of the file's lines, in their order; [] where there is no file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found = [_objects(line) for line in lines]
    first = next((objects[0] for objects in found if objects), {})
    for number, (line, objects) in enumerate(zip(lines, found, strict=True), 1):
        if objects is None:
            found[number - 1] = _behind_torn_text(line, first)
            if number < len(lines):
                _tell(path, number, line)
    return [each for objects in found for each in objects or ()]


def _objects(line: bytes) -> list[dict[str, Any]] | None:
    """The object of a line, if there is anything in it; None where it is damaged."""
    text = line.strip(b"\0 \t\r\n\xef\xbb\xbf")
    if not text:
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [value] if isinstance(value, dict) else None


def _behind_torn_text(line: bytes, sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Objects that were appended to a torn line. They begin as the file's other lines do, which no inner object does."""
    begin = b'{"' + next(iter(sample)).encode() + b'"' if sample else b"{"
    found: list[dict[str, Any]] = []
    at = line.find(begin, 1) if sample else -1
    while at > 0:
        end = line.find(begin, at + 1)
        found += _objects(line[at : end if end > 0 else len(line)]) or []
        at = end
    return found


def _tell(path: Path, number: int, line: bytes) -> None:
    place = (str(path), number, line[:200])
    if place not in _told:
        _told.add(place)
        log.warning("%s, line %d is damaged and left out: %r", path, number, line[:60])


class AppendedFile:
    """A file of lines, opened to grow. What a crash tore off at its end is removed first, so that every new line is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _repair_end(path)
        self._file = path.open("ab", buffering=0)

    def append(self, line: str, *, durable: bool = False) -> None:
        """Write one line; with `durable`, return when the disk has it."""
        self._file.write(line.encode() + b"\n")
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _repair_end(path: Path) -> None:
    """Cut off what stands behind the last whole line; give a last line that is only without its end that end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        kept = text.rstrip(b"\0")
        end = kept.rfind(b"\n") + 1
        if kept[end:] and _objects(kept[end:]):
            file.seek(len(kept))
            file.write(b"\n")
            file.truncate()
        elif end < len(text):
            file.truncate(end)
