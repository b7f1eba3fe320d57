"""How an input is dealt to tasks, and what an interrupted job is known by."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.data.documents import Piece, piece_bytes

SHARD_PIECES = 512


def make_shards(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Consecutive pieces, up to `piece_bytes` and SHARD_PIECES together; one that is dealt out in blocks alone."""
    shards: list[list[Piece]] = []
    each = piece_bytes(pieces)
    held = 0
    for piece in pieces:
        dealt = piece.block or (shards and shards[-1][-1].block)
        if not shards or dealt or held + piece.size > each or len(shards[-1]) >= SHARD_PIECES:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.size
    return shards


def digest(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def stamps(files: Sequence[Piece]) -> list[tuple[str, int, str]]:
    """What tells a file from a changed one: path, size, and a stamp that changes with it."""
    return [(file.path, file.size, file.stamp) for file in files]


def prepare_folder(folder: str, recipe: dict[str, Any]) -> bool:
    """Makes the folder for shards; one left by an interrupted run of the same recipe is kept (True), any other is
    emptied."""
    mark = Path(folder, "recipe")
    if mark.exists() and mark.read_text() == digest(recipe):
        remove_partial(folder)
        return True
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    mark.write_text(digest(recipe))
    return False


def remove_partial(folder: str) -> None:
    """Removes the files that tasks which were killed have begun."""
    for path in Path(folder).glob("*.partial"):
        path.unlink(missing_ok=True)
