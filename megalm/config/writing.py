"""Writing into a run's folder: whole files, and one message where the file system refuses."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.config.errors import ConfigError, explain_full_disk

_WHY = {
    errno.ENAMETOOLONG: "the name is too long: choose a shorter {key}",
    errno.ENOTDIR: "a part of the path is a file: choose another {key}",
    errno.EEXIST: "there is a file of this name: choose another {key}",
    errno.EROFS: "it lies on a file system that is read-only: choose another {key}",
    errno.EACCES: "this user may not write there: choose another {key}",
    errno.EPERM: "this user may not write there: choose another {key}",
}


@contextmanager
def explain_failed_writes(folder: Path, *, key: str = "run.name") -> Iterator[None]:
    """Turns what the file system refuses in a folder of a run into one message. Errors: ConfigError in place of OSError.

    key: the setting that chooses another folder.
    """
    try:
        yield
    except OSError as error:
        choices = "run.dir or run.name" if key == "run.name" else key
        why = _WHY.get(error.errno or 0, f"{error.strerror or error}: choose another {{key}}").format(key=choices)
        what = "the run's folder" if key == "run.name" else "the folder of the checkpoints,"
        raise explain_full_disk(error) or ConfigError(f"{what} {_short(folder)} cannot be written: {why}.") from None


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or nothing, durably."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut after the rename leaves zeros where the text was
    os.replace(aside, path)


def _short(folder: Path) -> str:
    text = str(folder)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"
