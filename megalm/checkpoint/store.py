"""The place that a run's checkpoints are in: a folder, or (in `megalm.checkpoint.remote`) an object store."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from megalm.checkpoint.address import read_url
from megalm.checkpoint.commit import (
    delete_superseded,
    list_committed,
    name_step,
    parse_step,
    remove,
    remove_left_over,
    set_aside,
    write_file,
)
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError, NoSpaceError, wants_space
from megalm.checkpoint.manifest import MANIFEST
from megalm.checkpoint.source import CheckpointSource, LocalSource
from megalm.config.errors import ConfigError

T = TypeVar("T")


class Store(Protocol):
    """Committed checkpoints under one path, by name."""

    where: str
    """The folder or URL, for messages."""

    def names(self) -> list[str]:
        """Committed checkpoints, newest step first; whether each is good is its manifest's to say."""
        ...

    def step(self, name: str) -> int:
        """The step in a checkpoint's name."""
        ...

    def source(self, name: str) -> CheckpointSource:
        """One of them, for reading."""
        ...

    def remove(self, name: str) -> None:
        """Delete one; a reader never sees a part of it as a checkpoint."""
        ...

    def retain(self, keep: int, keep_every: int, up_to: int | None = None) -> list[str]:
        """Delete those that retention gives up, never the newest good one, of the steps up to `up_to` (None: of all)."""
        ...

    def set_aside(self, names: Sequence[str]) -> str:
        """Move checkpoints to where they are never counted, resumed or deleted; returns where that is."""
        ...

    def clear(self) -> None:
        """Delete what interrupted saves and deletions left."""
        ...

    def try_writing(self) -> None:
        """Write something small. Errors: CheckpointError if it cannot be."""
        ...

    def free_bytes(self) -> int | None:
        """Room that is left; None where that cannot be known."""
        ...

    def read_note(self, name: str) -> str | None:
        """Read a small text that lies beside the checkpoints; None if it is not there. Errors: CheckpointError."""
        ...

    def write_note(self, name: str, text: str) -> None:
        """Put one there. Errors: CheckpointError."""
        ...


class LocalStore:
    """A folder on a local or shared file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def names(self) -> list[str]:
        return [path.name for path in list_committed(self.folder)]

    def step(self, name: str) -> int:
        return parse_step(self.folder / name)

    def source(self, name: str) -> CheckpointSource:
        return LocalSource(self.folder / name)

    def remove(self, name: str) -> None:
        remove(self.folder / name)

    def retain(self, keep: int, keep_every: int, up_to: int | None = None) -> list[str]:
        return delete_superseded(self.folder, keep, keep_every, up_to)

    def set_aside(self, names: Sequence[str]) -> str:
        return self._on_disk(lambda: str(set_aside(self.folder, names)))

    def clear(self) -> None:
        remove_left_over(self.folder)

    def try_writing(self) -> None:
        def write() -> None:
            if self.folder.is_symlink() and not self.folder.exists():
                raise CheckpointError(f"{self.folder} is a link to {os.readlink(self.folder)}, which is not there")
            self.folder.mkdir(parents=True, exist_ok=True)
            # As a save does it, and with a name that the next start clears away, should this one be killed here.
            aside = self.folder / f"{name_step(0)}.tmp-{os.urandom(6).hex()}"
            try:
                aside.mkdir()
                write_file(aside / "trial", [bytes(4096)])
            finally:
                remove(aside)

        self._on_disk(write)

    def free_bytes(self) -> int | None:
        with suppress(OSError):
            space = shutil.disk_usage(self.folder)
            return space.free if space.total else None  # some file systems cannot tell
        return None

    def read_note(self, name: str) -> str | None:
        path = self.folder / name
        return self._on_disk(lambda: path.read_text(encoding="utf-8", errors="replace") if path.exists() else None)

    def write_note(self, name: str, text: str) -> None:
        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self.folder / f"{name}.new"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self.folder / name)

        self._on_disk(write)

    def _on_disk(self, action: Callable[[], T]) -> T:
        """`action()`; what the file system says against it becomes a CheckpointError."""
        try:
            return action()
        except OSError as error:
            kind = NoSpaceError if wants_space(error) else CheckpointError
            at = f" ({error.filename})" if error.filename not in (None, str(self.folder)) else ""
            raise kind(f"{self.folder} cannot be used: {error.strerror or error}{at}") from None


def place_of(path: Path | str) -> str:
    """Where the checkpoint, or the checkpoints, that `path` means lie: two paths into the same place give the same."""
    named = find_named_checkpoint(path)
    where = named.name.rstrip("/").rpartition("/")[0] or "." if named is not None else find_store(path).where
    return where if read_url(where) else str(Path(where).resolve())


def open_store(path: Path | str) -> Store:
    """Open the store at a folder or a fsspec URL."""
    url = read_url(path)
    if url is None:
        return LocalStore(Path(path))
    from megalm.checkpoint.remote import RemoteStore

    return RemoteStore(url)


def find_store(path: Path | str) -> Store:
    """Find the store at a folder of checkpoints, or at the `checkpoints/` of a run's folder."""
    store, inner = open_store(path), open_store(f"{path}/checkpoints")
    return inner if not store.names() and inner.names() else store


def open_checkpoint(path: Path | str) -> CheckpointSource:
    """Open the checkpoint that `path` means: itself, or the newest good one under it or under its `checkpoints/`.

    Errors: ConfigError when there is none.
    """
    found = find_named_checkpoint(path)
    if found is not None:
        return found
    store = find_store(path)
    for name in store.names():
        source = store.source(name)
        try:
            source.manifest()
            return source
        except CorruptCheckpointError:
            continue
    raise ConfigError(
        f"{path}: there is no checkpoint (a folder such as step-00000100 with a good {MANIFEST}). Give a run's folder, "
        "such as runs/first, or a checkpoint of one."
    )


def find_named_checkpoint(path: Path | str) -> CheckpointSource | None:
    """`path` as a checkpoint, if it holds a manifest; None if it does not (it may be a folder of checkpoints)."""
    url = read_url(path)
    if url is None:
        return LocalSource(Path(path)) if (Path(path) / MANIFEST).exists() else None
    from megalm.checkpoint.remote import RemoteSource, open_url

    files, root = open_url(url)
    return RemoteSource(files, root, url) if files.exists(f"{root}/{MANIFEST}") else None
