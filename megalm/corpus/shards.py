"""How an input is dealt to tasks, what an interrupted job is known by, and the folder where its parts wait."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus.documents import Piece, choose_piece_bytes

SHARD_PIECES = 512


def make_shards(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Consecutive pieces, up to `choose_piece_bytes` and SHARD_PIECES together; one that is dealt out in blocks alone."""
    shards: list[list[Piece]] = []
    each = choose_piece_bytes(pieces)
    held = 0
    for piece in pieces:
        dealt = piece.block or (shards and shards[-1][-1].block)
        if not shards or dealt or held + piece.size > each or len(shards[-1]) >= SHARD_PIECES:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.size
    return shards


def hash_json(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def stamp_files(files: Sequence[Piece]) -> list[tuple[str, int, str]]:
    """What tells a file from a changed one: path, size, and a stamp that changes with it."""
    return [(file.path, file.size, file.stamp) for file in files]


def check_unchanged(files: Sequence[Piece]) -> None:
    """Errors: ConfigError if a file of this machine is not what it was when it was found."""
    for file in files:
        if "://" in file.path or file.name or not file.stamp:
            continue
        try:
            status = os.stat(file.path)
        except OSError:
            status = None
        if status is None or (status.st_size, str(status.st_mtime_ns)) != (file.size, file.stamp):
            raise ConfigError(
                f"{file.path} changed while it was read: the result would be of neither the old nor the new content. Give "
                "the command again when nothing writes to it."
            )


class WorkFolder:
    """A folder for what waits until a job is done. What an interrupted run of the same recipe left is kept, anything
    else removed; without a recipe nothing is kept.

    Errors: ConfigError if the folder cannot be made, holds files of somebody else, or another process works in it.
    """

    def __init__(self, path: str, recipe: dict[str, Any] | None):
        self.path = os.path.abspath(path)
        mark = Path(self.path, "recipe")
        try:
            self._lock = self._locked()
            wanted = None if recipe is None else hash_json(recipe)
            there = mark.read_text() if mark.exists() else None
            if there is None and wanted is not None and (foreign := next(os.scandir(self.path), None)) is not None:
                os.close(self._lock)
                raise ConfigError(
                    f"{foreign.path} is not of an interrupted run, and the parts of the result would wait in its folder, which "
                    "is emptied: choose another output, or move the folder."
                )
            self.kept = there is not None and there == wanted
            """Whether there may be something to go on with."""
            self.of_another = there is not None and not self.kept
            for entry in os.scandir(self.path):
                if not self.kept:
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
                elif entry.name.endswith(".partial"):  # of a task that was killed
                    os.unlink(entry.path)
            if wanted is not None:
                mark.write_text(wanted)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}), where the parts of the result wait: choose another output."
            ) from error

    def _locked(self) -> int:
        while True:
            os.makedirs(self.path, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(lock)
                    raise ConfigError(
                        f"another run is at work on this output (its parts are in {self.path}): wait for its end, or choose "
                        "another output."
                    ) from error  # else the file system has no locks
            if os.path.exists(self.path) and os.path.samestat(os.fstat(lock), os.stat(self.path)):
                return lock
            os.close(lock)  # the run that was at work here has just ended

    def close(self, keep: bool) -> None:
        """Removes the folder, or leaves in it what is whole."""
        if keep:
            for path in Path(self.path).glob("*.partial"):
                path.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
