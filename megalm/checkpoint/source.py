"""Where a committed checkpoint is read from."""

import os
from pathlib import Path
from typing import Protocol

from megalm.checkpoint.commit import read_manifest
from megalm.checkpoint.errors import CorruptCheckpointError
from megalm.checkpoint.manifest import Manifest, compute_checksum


class CheckpointSource(Protocol):
    """One checkpoint, opened for reading."""

    name: str
    """What to call it in messages: the folder, or the URL."""

    def manifest(self) -> Manifest:
        """The manifest, with every file there in its full length; CorruptCheckpointError otherwise."""
        ...

    def read(self, file: str, position: int, length: int) -> memoryview:
        """Exactly `length` bytes of a file from `position` on; CorruptCheckpointError if they cannot be had."""
        ...


class LocalSource:
    """A checkpoint's folder on a local or shared file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    def read(self, file: str, position: int, length: int) -> memoryview:
        buffer = bytearray(length)
        view = memoryview(buffer)
        try:
            descriptor = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < length:
                    count = os.preadv(descriptor, [view[done:]], position + done)
                    if count == 0:
                        raise CorruptCheckpointError(f"{self.path / file}: ends at byte {position + done}")
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CorruptCheckpointError(f"{self.path / file}: {error.strerror or error}") from None
        return view


def read_checked(source: CheckpointSource, manifest: Manifest, file: str) -> memoryview:
    """Read a whole small file, compared with its checksum in the manifest."""
    record = manifest.files[file]
    data = source.read(file, 0, record.bytes)
    if compute_checksum(data) != record.xxh3:
        raise CorruptCheckpointError(f"{source.name}: {file} is not what was saved (its checksum differs)")
    return data
