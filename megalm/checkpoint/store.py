"""The place that a run's checkpoints are in: a folder, or (in `megalm.checkpoint.remote`) an object store."""

import re
from pathlib import Path
from typing import Protocol

from megalm.checkpoint.commit import committed, remove, retain, step_of
from megalm.checkpoint.errors import CorruptCheckpointError
from megalm.checkpoint.manifest import MANIFEST
from megalm.checkpoint.source import LocalSource, Source
from megalm.config.errors import ConfigError


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

    def source(self, name: str) -> Source:
        """One of them, for reading."""
        ...

    def remove(self, name: str) -> None:
        """Delete one; a reader never sees a part of it as a checkpoint."""
        ...

    def retain(self, keep: int, keep_every: int) -> None:
        """Delete those that retention gives up, never the newest good one."""
        ...


class LocalStore:
    """A folder on a local or shared file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def names(self) -> list[str]:
        return [path.name for path in committed(self.folder)]

    def step(self, name: str) -> int:
        return step_of(self.folder / name)

    def source(self, name: str) -> Source:
        return LocalSource(self.folder / name)

    def remove(self, name: str) -> None:
        remove(self.folder / name)

    def retain(self, keep: int, keep_every: int) -> None:
        retain(self.folder, keep, keep_every)


def as_url(path: Path | str) -> str | None:
    """`path` if it is a URL (also one that went through `Path`, which makes `s3://b` into `s3:/b`); None for a folder."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path))
    return f"{match[1]}://{match[2]}" if match else None


def open_store(path: Path | str) -> Store:
    """The store at a folder or a fsspec URL."""
    url = as_url(path)
    if url is None:
        return LocalStore(Path(path))
    from megalm.checkpoint.remote import RemoteStore

    return RemoteStore(url)


def store_under(path: Path | str) -> Store:
    """The store at a folder of checkpoints, or at the `checkpoints/` of a run's folder."""
    store, inner = open_store(path), open_store(f"{path}/checkpoints")
    return inner if not store.names() and inner.names() else store


def open_checkpoint(path: Path | str) -> Source:
    """The checkpoint that `path` means: itself, or the newest good one under it or under its `checkpoints/`.

    Errors: ConfigError when there is none.
    """
    found = named_checkpoint(path)
    if found is not None:
        return found
    store = store_under(path)
    for name in store.names():
        source = store.source(name)
        try:
            source.manifest()
            return source
        except CorruptCheckpointError:
            continue
    raise ConfigError(f"{path}: there is no checkpoint (a folder such as step-00000100 with a good {MANIFEST}).")


def named_checkpoint(path: Path | str) -> Source | None:
    """`path` as a checkpoint, if it holds a manifest; None if it does not (it may be a folder of checkpoints)."""
    url = as_url(path)
    if url is None:
        return LocalSource(Path(path)) if (Path(path) / MANIFEST).exists() else None
    from megalm.checkpoint.remote import RemoteSource, open_url

    files, root = open_url(url)
    return RemoteSource(files, root, url) if files.exists(f"{root}/{MANIFEST}") else None
