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
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Row = dict[str, Any]

_told: set[tuple[str, int, bytes]] = set()
"""Damage that this process has told of: file, line, and its text."""


def read_json_lines(path: Path, whole: Callable[[Row], bool] = bool) -> list[Row]:
    """Read the objects of the file's lines, in their order; [] where there is no file.

    whole: whether an object is what the file's lines are made of; one that is not counts as damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return parse_json_lines(lines, str(path), whole)


def parse_json_lines(lines: list[bytes], source: str, whole: Callable[[Row], bool] = bool) -> list[Row]:
    """Parse lines that were read already, the last of which has no end; `source` names them where one is damaged."""
    found = [_objects(line, whole) for line in lines]
    first = next((objects[0] for objects in found if objects), None)
    rows: list[Row] = []
    for number, (line, objects) in enumerate(zip(lines, found, strict=True), 1):
        if objects is None:
            objects = _behind_torn_text(line, first, whole)
            if number < len(lines):
                _tell(source, number, line)
        rows += objects
    return rows


def _objects(line: bytes, whole: Callable[[Row], bool] = bool) -> list[Row] | None:
    """Yield the object of a line, if there is anything in it; None where it is damaged."""
    text = line.strip(b"\0 \t\r\n\xef\xbb\xbf")
    if not text:
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [value] if isinstance(value, dict) and whole(value) else None


def _behind_torn_text(line: bytes, sample: Row | None, whole: Callable[[Row], bool]) -> list[Row]:
    """Find objects that were appended to a torn line: they begin as the file's other lines do, no inner object does."""
    rows: list[Row] = []
    if sample is not None:
        begin = b"{" + json.dumps(next(iter(sample))).encode() + b":"
        at = line.find(begin, 1)
        while at > 0:
            end = line.find(begin, at + 1)
            rows += _objects(line[at : end if end > 0 else len(line)], whole) or []
            at = end
    return rows


def _tell(source: str, number: int, line: bytes) -> None:
    place = (source, number, line[:200])
    if place not in _told:
        _told.add(place)
        log.warning("%s, line %d is damaged and left out: %s", source, number, repr(line[:60])[1:])


class AppendedFile:
    """A file that lines are appended to. A line that a crash tore is removed first, so that every new line is whole.

    While the disk takes nothing (it is full, or gone), lines are kept and written with the first that it takes; a line of
    which it took a part is taken back. So the file is whole at any time, and a run outlives a disk that is full for a while.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _repair_end(path)
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting = b""

    def append(self, line: str, *, durable: bool = False) -> bool:
        """Write one line; with `durable`, return when the disk has it. False where it takes nothing, which is logged once
        each time that it begins."""
        assert self._file is not None, "the file is closed"
        was_waiting = bool(self._waiting)
        self._waiting += line.encode() + b"\n"
        try:
            self._write(self._file)
            if durable:
                os.fsync(self._file)
        except OSError as error:
            if not was_waiting:
                log.error("%s cannot be written (%s): its lines are kept until it can", self.path, error.strerror)
            return False
        if was_waiting:
            log.info("%s can be written again", self.path)
        return True

    def _write(self, file: int) -> None:
        """Write all that waits, or nothing of it."""
        end, written = os.fstat(file).st_size, 0
        try:
            while written < len(self._waiting):
                written += os.write(file, self._waiting[written:])
        except OSError:
            os.ftruncate(file, end)
            raise
        self._waiting = b""

    def close(self) -> None:
        """Write what still waits, if the disk takes it now, and close the file."""
        if self._file is None:
            return
        try:
            self._write(self._file)
        except OSError as error:
            lost = self._waiting.count(b"\n")
            log.error("%s cannot be written (%s): its last %d lines are lost", self.path, error.strerror, lost)
        os.close(self._file)
        self._file = None


def _repair_end(path: Path) -> None:
    """Cut off what stands behind the last whole line; give a last line that lacks only its end that end."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    kept = text.rstrip(b"\0")
    end = kept.rfind(b"\n") + 1
    if kept[end:] and _objects(kept[end:]):
        with path.open("r+b") as file:
            file.seek(len(kept))
            file.write(b"\n")
            file.truncate()
    elif end < len(text):
        os.truncate(path, end)
