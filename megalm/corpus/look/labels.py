"""Labels that people give to documents: lines that are only ever appended, each on disk before the next request is answered.

A line is `{"key", "label", "text", "place", "time"}`; the last line of a key counts, and a label of null takes the label back.
The file is a list for the rule `labels` of `megalm filter`, and its texts are what `megalm filter train` takes, label by label.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megalm.config.errors import ConfigError

LONGEST = 40
BEGIN = b'{"key": "'  # of every line


def make_key(text: str) -> str:
    """Make what a text is known by, wherever it lies: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Label:
    """What somebody said of a text."""

    key: str
    label: str | None
    text: str
    place: str
    time: float


class Labels:
    """The file of labels, which may not be there yet.

    Errors: ConfigError for a file that cannot be used, or holds other lines.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.latest: dict[str, Label] = {}
        self._lock = threading.Lock()
        for one in read_labels(self.path) if self.path.exists() else ():
            self._count(one)

    def give(self, key: str, label: str | None, text: str, place: str) -> None:
        """Writes a label durably, and only then counts it.

        Errors: ConfigError for a label that is none, or where the file cannot be written.
        """
        if label is not None and (not label.strip() or len(label) > LONGEST or "/" in label or not label.isprintable()):
            raise ConfigError(f"label {label!r}: give up to {LONGEST} printable characters without a slash.")
        one = Label(key, label, text, place, round(time.time(), 3))
        line = json.dumps(asdict(one), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            try:
                _append(self.path, line)
            except OSError as error:
                raise ConfigError(
                    f"{self.path} cannot be written ({error.strerror}): the label was not kept."
                ) from error
            self._count(one)

    def of_label(self, label: str) -> list[Label]:
        """The texts that have this label now."""
        return [one for one in self.latest.values() if one.label == label]

    def counts(self) -> dict[str, int]:
        """How many texts have each label."""
        found: dict[str, int] = {}
        for one in self.latest.values():
            found[str(one.label)] = found.get(str(one.label), 0) + 1
        return dict(sorted(found.items()))

    def _count(self, one: Label) -> None:
        if one.label is None:
            self.latest.pop(one.key, None)
        else:
            self.latest[one.key] = one


def _append(path: Path, line: bytes) -> None:
    """Behind what is there; a line that a crash cut off gets its end first, so that it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name of the file, too
        finally:
            os.close(folder)


def read_labels(path: str | Path) -> Iterator[Label]:
    """Read all lines; one that a crash cut off is passed over.

    Errors: ConfigError for a file that is not there, or holds something else.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"labels {path} cannot be read ({error.strerror}): `megalm look` writes them.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip(b"\0 \t\r"):  # zeros: a length that reached the disk before its bytes did
            continue
        try:
            found = json.loads(line)
        except ValueError:
            if line.startswith(BEGIN[: len(line)]):
                continue  # cut off: a beginning of a line is never JSON
            raise _refuse(path, number) from None
        try:
            yield Label(found["key"], found["label"], str(found["text"]), str(found["place"]), float(found["time"]))
        except (ValueError, KeyError, TypeError):
            raise _refuse(path, number) from None


def _refuse(path: str | Path, number: int) -> ConfigError:
    return ConfigError(
        f"{path}: line {number} is no label of `megalm look` (key, label, text, place, time): name another file."
    )
