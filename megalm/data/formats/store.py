"""Files of data sets, on this machine or in an object store, under one face: sizes, byte ranges, arrays.

Remote files (any fsspec URL: `s3://`, `gs://`, `memory://`, `file://`) come in blocks through a bounded cache in a local
folder that the ranks of a machine share: each block is fetched once, by whoever needs it first, and the least recently
used ones go when the cache is full. Requests are tried again; nothing is written to shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megalm.config.errors import ConfigError, explain_full_disk

BLOCK = 1 << 20  # bytes of a request: beyond it an object store gives its full speed
OPEN_BLOCKS = 64  # that stay mapped in a process
FIRST_PAUSE_S = 0.25  # after a failed request, doubled each time
SCAN_SHARE = 0.02  # of the cache's limit may be written between two looks at how full it is
DEFAULT_CACHE = "~/.cache/megalm/data"


def is_url(path: str | os.PathLike) -> bool:
    """Whether this names something in a store rather than a file."""
    return "://" in os.fspath(path)


class Bytes(Protocol):
    """A file that can be read anywhere."""

    name: str
    size: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Shapes: -> uint8 [stop - start]; shorter at the end of the file"""

    def array(self, offset: int, dtype: np.dtype, count: int) -> Any:
        """Part of the file as an array that is read where it is looked at."""

    def prefetch(self, start: int, stop: int) -> None:
        """These bytes will be read soon; begin to fetch them."""


class LocalFile:
    """A file of this machine, mapped.

    Errors: ConfigError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as error:
            raise ConfigError(
                f"{self.name}: cannot be read ({error.strerror}). Give a file that is there and may be read."
            ) from error
        self._raw = np.frombuffer(self._map, np.uint8) if self._map else np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._raw[start:stop]

    def array(self, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
        return self._raw[offset : offset + count * dtype.itemsize].view(dtype)

    def prefetch(self, start: int, stop: int) -> None:
        """Of what is not in memory the kernel reads these pages and no others, without waiting for them. Touching one
        would wait, and read far beyond it, which takes the longer the larger the file is."""
        low, stop = start & -mmap.PAGESIZE, min(stop, self.size)
        if self._map is not None and 0 <= low < stop:
            self._map.madvise(mmap.MADV_WILLNEED, low, stop - low)


class Cache:
    """Blocks of remote files in a local folder, at most `limit` bytes of them.

    tries: of each request. Threads fetch `parallel` blocks at a time.
    """

    def __init__(
        self, folder: str | os.PathLike = DEFAULT_CACHE, limit: float = 1e10, tries: int = 5, parallel: int = 16
    ):
        self.folder = Path(os.path.expanduser(os.fspath(folder)))
        self.limit, self.tries = int(limit), tries
        self._written = self.limit  # look how full it is before the first block comes
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="fetch")
        self._coming: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, size: int, fetch: Callable[[], bytes]) -> Path:
        """The file of this key; fetched, once on this machine, where it is not there.

        Errors: ConfigError if it does not fit, or the disk is full; what `fetch` raises.
        """
        path = self._path(key)
        if self._here(path, size):
            return path
        if size > self.limit:
            raise ConfigError(
                f"the data cache {self.folder} holds {self.limit:,} bytes, and a single piece has {size:,}: set data.cache_gb "
                f"to {size / 1e9 * 4:.2g} or more."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._here(path, size):
                    return path
                self._make_room(size)
                data = fetch()
                aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
                try:
                    aside.write_bytes(data)
                    os.replace(aside, path)
                finally:
                    aside.unlink(missing_ok=True)
        except OSError as error:
            raise explain_full_disk(error) or ConfigError(
                f"the data cache {self.folder} cannot be used ({error.strerror or error}): set data.cache to a folder "
                "that may be written."
            ) from error
        return path

    def ahead(self, key: str, size: int, fetch: Callable[[], bytes]) -> None:
        """Begin to fetch it in the background; its errors are those of the `get` that follows."""
        if self._path(key).exists():
            return
        with self._lock:
            if key not in self._coming:
                future = self._coming[key] = self._pool.submit(self.get, key, size, fetch)
                future.add_done_callback(lambda _: self._coming.pop(key, None))

    def _path(self, key: str) -> Path:
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest

    def _here(self, path: Path, size: int) -> bool:
        try:
            if os.stat(path).st_size != size:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago, where the cache would grow beyond its limit."""
        self._written += size
        if self._written < self.limit * SCAN_SHARE:
            return
        found = []
        for part in self.folder.iterdir():
            with contextlib.suppress(OSError), os.scandir(part) as entries:  # another rank makes room too
                for entry in entries:
                    if not entry.name.startswith("."):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = size + sum(item[1] for item in found)
        self._written = 0
        if total <= self.limit:
            self._written = max(0, int(total - self.limit * (1 - SCAN_SHARE)))
            return
        for _, used, path in sorted(found):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= used
            if total <= self.limit * (1 - SCAN_SHARE):
                break

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Store:
    """A folder or bucket behind fsspec.

    Errors: ConfigError for a protocol that is not installed.
    """

    def __init__(self, url: str, tries: int = 5):
        import fsspec

        self.url, self.tries = url.rstrip("/"), tries
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: {error}. For s3:// install the extra: pip install megalm[s3].") from None

    def persistently(self, what: str, action: Callable[[], Any]) -> Any:
        """`action()`, tried again when the store fails it.

        Errors: ConfigError for what is not there or not allowed, and when the last try fails.
        """
        pause = FIRST_PAUSE_S
        for attempt in range(self.tries):
            try:
                return action()
            except FileNotFoundError:
                raise ConfigError(
                    f"{what}: is not in the store: there is no such bucket, folder or file. Check the URL, and the "
                    "endpoint and credentials that the store's client uses."
                ) from None
            except PermissionError as error:
                raise ConfigError(f"{what}: may not be read ({error}). Check the credentials.") from None
            except ConfigError:
                raise
            except Exception as error:  # every backend has exceptions of its own
                if attempt == self.tries - 1:
                    raise ConfigError(
                        f"{what}: cannot be read after {self.tries} tries ({type(error).__name__}: {error}). Run again "
                        "when the store can be reached; data.retries sets the number of tries."
                    ) from error
            time.sleep(pause * (0.5 + random.random()))
            pause *= 2
        raise AssertionError

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else str(self.root)

    def exists(self, name: str = "") -> bool:
        """Whether this file is there."""
        return bool(self.persistently(f"{self.url}/{name}", lambda: self.files.exists(self._path(name))))

    def info(self, name: str = "") -> dict[str, Any]:
        """Size, and what identifies this version of the file."""

        def ask() -> dict[str, Any]:
            self.files.invalidate_cache()
            return self.files.info(self._path(name))

        return self.persistently(self._full(name), ask)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a byte range, or the whole file. A range that comes shorter is asked for again, then an error."""

        def get() -> bytes:
            data = self.files.cat_file(self._path(name), start=start, end=stop)
            if start is not None and stop is not None and len(data) != stop - start:
                raise EOFError(
                    f"bytes {start} to {stop} came as {len(data)} bytes: the file is truncated or was replaced"
                )
            return data

        return self.persistently(self._full(name), get)

    def _full(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


class RemoteFile:
    """A file in an object store, in blocks through the cache."""

    def __init__(self, url: str, cache: Cache):
        self.name, self.cache = url, cache
        self._store = Store(url, cache.tries)
        info = self._store.info()
        self.size = int(info["size"] or 0)
        marks = [str(info.get(key)) for key in ("ETag", "etag", "mtime", "created", "LastModified") if info.get(key)]
        self._key = "\0".join([url, str(self.size), *marks])
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        start, stop = max(0, start), min(stop, self.size)
        if stop <= start:
            return np.empty(0, np.uint8)
        numbers = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        if len(numbers) > 1:
            self.prefetch(start, stop)
        parts = [self._block(n)[max(0, start - n * BLOCK) : stop - n * BLOCK] for n in numbers]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def array(self, offset: int, dtype: np.dtype, count: int) -> RemoteArray:
        return RemoteArray(self, offset, dtype, count)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to fetch these bytes."""
        for number in range(max(0, start) // BLOCK, (min(stop, self.size) - 1) // BLOCK + 1):
            if number not in self._open:
                self.cache.ahead(*self._request(number))

    def _request(self, number: int) -> tuple[str, int, Callable[[], bytes]]:
        start, stop = number * BLOCK, min(self.size, (number + 1) * BLOCK)
        return f"{self._key}\0{number}", stop - start, lambda: self._store.read("", start, stop)

    def _block(self, number: int) -> np.ndarray:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        for _ in range(3):  # another rank may make room between finding a block and opening it
            path = self.cache.get(*self._request(number))
            with contextlib.suppress(FileNotFoundError):
                block = np.asarray(np.memmap(path, np.uint8, "r"))
                break
        else:
            raise ConfigError(
                f"the data cache {self.cache.folder} is too small: blocks go before they are read. Raise data.cache_gb."
            )
        with self._lock:
            self._open[number] = block
            while len(self._open) > OPEN_BLOCKS:
                self._open.popitem(last=False)
        return block


class RemoteArray:
    """An array in a remote file; indexing reads what it needs."""

    def __init__(self, file: RemoteFile, offset: int, dtype: np.dtype, count: int):
        self.file, self.offset, self.dtype, self.count = file, offset, np.dtype(dtype), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.count)
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._read(start, max(start, stop))
        if np.ndim(index) == 0:
            number = int(index) + (self.count if int(index) < 0 else 0)
            if not 0 <= number < self.count:
                raise IndexError(f"{self.file.name}: there is no element {index} of {self.count}")
            return self._read(number, number + 1)[0]
        index = np.asarray(index)
        if not len(index):
            return np.empty(0, self.dtype)
        low, high = int(index.min()), int(index.max()) + 1
        if high - low <= max(BLOCK, 4 * len(index)):
            return self._read(low, high)[index - low]
        return np.array([self[number] for number in index], self.dtype)

    def _read(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        raw = self.file.read(self.offset + start * size, self.offset + stop * size)
        return (
            raw.view(self.dtype)
            if raw.flags.c_contiguous and raw.ctypes.data % size == 0
            else np.frombuffer(raw.tobytes(), self.dtype)
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to fetch these elements."""
        size = self.dtype.itemsize
        self.file.prefetch(self.offset + start * size, self.offset + stop * size)


def open_bytes(path: str, cache: Cache | None) -> Bytes:
    """Open a local file, or a URL's through the cache."""
    return RemoteFile(path, cache or Cache()) if is_url(path) else LocalFile(path)
