"""Checkpoints in an object store, or anything else that fsspec reaches: `s3://`, `gs://`, `file://`, `memory://`.

There is no rename in an object store. Each attempt at a step has a folder of its own, `step-00000100.<attempt>/`, and
its manifest is uploaded last: readers look for manifests, so what has none is nothing, and files of two attempts never
mix.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import fsspec

from megalm.checkpoint.commit import free_name, list_superseded, name_step
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError
from megalm.checkpoint.manifest import MANIFEST, Manifest, check_sizes, decode
from megalm.checkpoint.source import CheckpointSource
from megalm.config.errors import ConfigError

_NAME = re.compile(r"step-(\d{8,})\.([0-9a-f]{12})")
# Tries of one request, and the pause after the first failure, doubled each time: about 4 s for a store that hiccups.
# Longer outages are waited out by the uploader, which tries a whole checkpoint again and again.
TRIES = 4
FIRST_PAUSE_S = 0.5

T = TypeVar("T")


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). ConfigError for a protocol that is not installed."""
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        extra = " (pip install megalm[s3])" if url.startswith("s3:") else ""
        raise ConfigError(f"{url}: {error}{extra}.") from None
    return files, str(root).rstrip("/")


def try_persistently(action: Callable[[], T], what: str) -> T:
    """`action()`, tried again when the store fails it; FileNotFoundError is an answer, and goes through at once.

    Errors: CheckpointError when the last try fails.
    """
    pause = FIRST_PAUSE_S
    for attempt in range(TRIES):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # every backend has exceptions of its own
            if attempt == TRIES - 1:
                raise CheckpointError(
                    f"{what}: the store cannot be reached ({type(error).__name__}: {error})"
                ) from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def name_attempt(manifest: Manifest) -> str:
    """`step-00000100.<attempt>`"""
    return f"{name_step(manifest.step)}.{manifest.attempt}"


class RemoteSource:
    """One checkpoint in the store."""

    def __init__(self, files: Any, root: str, url: str) -> None:
        self.files, self.root, self.name = files, root, url

    def manifest(self) -> Manifest:
        def sizes() -> dict[str, int]:
            self.files.invalidate_cache()
            return {entry["name"].rpartition("/")[2]: entry["size"] for entry in self.files.ls(self.root, detail=True)}

        where = f"{self.name}/{MANIFEST}"
        try:
            data = try_persistently(lambda: self.files.cat_file(f"{self.root}/{MANIFEST}"), where)
            found = try_persistently(sizes, self.name)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{where}: is not there") from None
        manifest = decode(data, where)
        check_sizes(manifest, found.get, self.name)
        return manifest

    def read(self, file: str, position: int, length: int) -> memoryview:
        if length == 0:
            return memoryview(bytearray())
        where = f"{self.name}/{file}"
        try:
            data = try_persistently(
                lambda: self.files.cat_file(f"{self.root}/{file}", start=position, end=position + length), where
            )
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{where}: is not there") from None
        if len(data) != length:
            raise CorruptCheckpointError(f"{where}: ends at byte {position + len(data)}")
        return memoryview(bytearray(data))


class RemoteStore:
    """The checkpoints under one URL."""

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self.files, self.root = open_url(url)

    def names(self) -> list[str]:
        """Folders with a manifest, newest step first; of two attempts at a step, the one saved later first."""

        def find() -> list[str]:
            self.files.invalidate_cache()
            return list(self.files.glob(f"{self.root}/step-*/{MANIFEST}"))

        found: dict[int, list[str]] = {}
        for path in try_persistently(find, self.where):
            name = str(path).split("/")[-2]
            if match := _NAME.fullmatch(name):
                found.setdefault(int(match[1]), []).append(name)
        for step, attempts in found.items():
            if len(attempts) > 1:
                found[step] = sorted(attempts, key=self._saved_at, reverse=True)
        return [name for step in sorted(found, reverse=True) for name in found[step]]

    def step(self, name: str) -> int:
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name!r} is no name of a checkpoint in a store")
        return int(match[1])

    def source(self, name: str) -> CheckpointSource:
        return RemoteSource(self.files, f"{self.root}/{name}", f"{self.where}/{name}")

    def remove(self, name: str) -> None:
        """The manifest goes first: from then on it is no checkpoint."""
        folder = f"{self.root}/{name}"
        self.files.invalidate_cache()
        if self.files.exists(f"{folder}/{MANIFEST}"):
            try_persistently(lambda: self.files.rm_file(f"{folder}/{MANIFEST}"), self.where)
        self.files.invalidate_cache()
        if self.files.exists(folder):
            try_persistently(lambda: self.files.rm(folder, recursive=True), self.where)

    def retain(self, keep: int, keep_every: int, up_to: int | None = None) -> list[str]:
        """Also removes what uploads of earlier steps left without a manifest."""
        names = [name for name in self.names() if up_to is None or self.step(name) <= up_to]
        doomed = list_superseded([(self.step(name), name) for name in names], self._is_good, keep, keep_every)
        newest = next((self.step(name) for name in names if self._is_good(name)), -1)
        for entry in try_persistently(lambda: self.files.ls(self.root, detail=False), self.where) if names else []:
            name = str(entry).rstrip("/").rpartition("/")[2]
            if _NAME.fullmatch(name) and name not in names and self.step(name) < newest:
                doomed.append(name)
        for name in doomed:
            self.remove(name)
        return doomed

    def set_aside(self, names: Sequence[str]) -> str:
        """Copied by the store itself, the manifest last, and then removed: at no moment there is neither."""
        self.files.invalidate_cache()
        listed = try_persistently(lambda: self.files.ls(self.root, detail=False), self.where)
        aside = free_name(str(entry).rstrip("/").rpartition("/")[2] for entry in listed)
        for name in names:
            for file in sorted(self._files_of(name), key=lambda file: file == MANIFEST):
                self._copy(f"{self.root}/{name}/{file}", f"{self.root}/{aside}/{name}", file)
            self.remove(name)
        return f"{self.where}/{aside}"

    def clear(self) -> None:
        """Nothing: what has no manifest may be another node's upload under way; `retain` knows which are old."""

    def try_writing(self) -> None:
        self.write_note(".writable", "")
        with suppress(Exception):  # who may write and not delete can train all the same
            self.files.rm_file(f"{self.root}/.writable")

    def free_bytes(self) -> int | None:
        return None

    def read_note(self, name: str) -> str | None:
        self.files.invalidate_cache()
        try:
            data = try_persistently(lambda: self.files.cat_file(f"{self.root}/{name}"), f"{self.where}/{name}")
        except FileNotFoundError:
            return None
        return bytes(data).decode(errors="replace")

    def write_note(self, name: str, text: str) -> None:
        def put() -> None:
            self._make_folder(self.root)
            self.files.pipe_file(f"{self.root}/{name}", text.encode())

        try:
            try_persistently(put, f"{self.where}/{name}")
        except FileNotFoundError as error:  # such as a bucket that is not there
            raise CheckpointError(f"{self.where}/{name}: {error}") from None

    def _files_of(self, name: str) -> list[str]:
        found = try_persistently(lambda: self.files.ls(f"{self.root}/{name}", detail=False), f"{self.where}/{name}")
        return [str(entry).rpartition("/")[2] for entry in found]

    def _copy(self, source: str, folder: str, file: str) -> None:
        self._make_folder(folder)
        try_persistently(lambda: self.files.copy(source, f"{folder}/{file}"), f"{self.where}: setting {file} aside")

    def _make_folder(self, path: str) -> None:
        protocol = self.files.protocol if isinstance(self.files.protocol, str) else self.files.protocol[0]
        if protocol in ("file", "memory"):  # the others have no folders to make
            self.files.makedirs(path, exist_ok=True)

    def upload(self, local: str, name: str, file: str, size: int) -> None:
        """Put one file of a checkpoint; CheckpointError if it cannot be, or is not there in its full length."""
        target = f"{self.root}/{name}/{file}"

        def put() -> None:
            self._make_folder(f"{self.root}/{name}")
            self.files.put_file(local, target)
            self.files.invalidate_cache()
            found = self.files.info(target)["size"]
            if found != size:
                raise OSError(f"{found} bytes arrived of {size}")

        try:
            try_persistently(put, f"{self.where}/{name}/{file}")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.where}/{name}/{file}: {error}") from None

    def _is_good(self, name: str) -> bool:
        try:
            self.source(name).manifest()
            return True
        except CorruptCheckpointError:
            return False

    def _saved_at(self, name: str) -> str:
        try:
            return self.source(name).manifest().saved_at
        except CorruptCheckpointError:
            return ""
