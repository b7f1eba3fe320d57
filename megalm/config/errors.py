"""The one exception that means "the person's input is wrong": printed as a message, exit status 2, no traceback."""

import difflib
import errno
from pathlib import Path


class ConfigError(Exception):
    """Configuration or input that cannot be used.

    The message says what was wrong with its value, what is allowed, and what to do next.
    """


def explain_missing_folder(path: Path, wanted: str) -> ConfigError:
    """The refusal of a folder that is not there: what is wanted, and the nearest one, or the newest runs of this place."""
    beside = path.parent if path.parent.is_dir() else Path()
    folders = [entry.name for entry in beside.iterdir() if entry.is_dir()] if beside.is_dir() else []
    near = difflib.get_close_matches(path.name, folders, n=1)
    hint = f" Did you mean {str(beside / near[0])!r}?" if near else ""
    runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    here = f" Runs here: {', '.join(str(file.parent) for file in runs[:5])}." if runs and not near else ""
    return ConfigError(f"{path}: no such folder.{hint} Give {wanted}.{here}")


def explain_full_disk(error: OSError) -> ConfigError | None:
    """Explain the error in words, if it says that a file could not be written for want of space; None for any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    place = f" at {error.filename}" if error.filename else ""
    return ConfigError(
        f"the disk is full, or a limit on space is reached{place} ({error.strerror}). Make room, or write somewhere else; "
        "the same command then goes on from what is done."
    )
