"""How a checkpoint becomes durable on a local file system, and how it goes away again.

A save writes into `step-00000100.tmp-<attempt>`, fsyncs every file and the folder, renames it to `step-00000100`, and
fsyncs the parent. A crash at any point leaves the folder with its final name either absent or whole. What a crash may
leave besides (`.tmp-*`, `.trash-*`) is never read, and removed by the next process that saves there.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError
from megalm.checkpoint.manifest import MANIFEST, FileRecord, Manifest, check_sizes, decode

_COMMITTED = re.compile(r"step-(\d{8,})(\.old-[0-9a-f]+)?")
_LEFT_OVER = re.compile(r"step-\d{8,}\.(tmp|trash)-[0-9a-f]+")
_SET_ASIDE = re.compile(r"earlier-(\d+)")

# Small pieces (archive heads, tails, norm weights) are gathered to one write call of about this size; large ones are cut
# into such writes, so that each is still in a core's cache when it is written after its checksum was taken.
WRITE_BYTES = 1 << 20

# The kernel is told to begin with the disk after so many bytes: else it waits for the fsync, and the disk with it.
WRITEBACK_BYTES = 32 << 20


def name_step(step: int) -> str:
    """`step-00000100`"""
    return f"step-{step:08d}"


def write_file(path: Path, parts: Iterable[Any]) -> FileRecord:
    """Create `path` from buffers, flush it to the device, and return its length and checksum.

    The checksum is of the buffers, not of what the file system gives back. Errors: OSError from any of the calls; an
    fsync that failed is not tried again, because the kernel forgets the pages that it could not write.
    """
    digest, length, begun = xxhash.xxh3_64(), 0, 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        pending = bytearray()
        for part in parts:
            data = memoryview(part).cast("B") if len(part) else memoryview(b"")
            if len(data) < WRITE_BYTES:
                digest.update(data)
                length += len(data)
                pending += data
                if len(pending) < WRITE_BYTES:
                    continue
                data = memoryview(b"")
            if pending:
                _write_all(descriptor, memoryview(pending))
                pending = bytearray()
            for start in range(0, len(data), WRITE_BYTES):
                block = data[start : start + WRITE_BYTES]
                digest.update(block)
                length += len(block)
                _write_all(descriptor, block)
                if length - begun >= WRITEBACK_BYTES:
                    _begin_writeback(descriptor, begun, length - begun)
                    begun = length
        _write_all(descriptor, memoryview(pending))
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return FileRecord(length, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (created, renamed, removed names) to the device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, final: Path) -> None:
    """Give a finished folder its final name, durably.

    A checkpoint of the same step that is there already (the step was trained again after a rollback) is first set
    aside under a name that readers still accept, so that at no moment there is neither.
    """
    replaced: Path | None = None
    if os.path.lexists(final):
        replaced = final.with_name(f"{final.name}.old-{os.urandom(4).hex()}")
        os.rename(final, replaced)
        sync_folder(final.parent)
    os.rename(aside, final)
    sync_folder(final.parent)
    if replaced is not None:
        remove(replaced)


def remove(path: Path) -> None:
    """Delete a checkpoint's folder: renamed first, so that a half-deleted one is never taken for a checkpoint."""
    match = _COMMITTED.fullmatch(path.name)
    if match:
        trash = path.with_name(f"step-{match[1]}.trash-{os.urandom(4).hex()}")
        os.rename(path, trash)
        sync_folder(path.parent)
        path = trash
    _delete(path)


def free_name(names: Iterable[str]) -> str:
    """`earlier-1`, or the number after those that are taken already."""
    taken = [int(match[1]) for name in names if (match := _SET_ASIDE.fullmatch(name))]
    return f"earlier-{max(taken, default=0) + 1}"


def set_aside(folder: Path, names: Sequence[str]) -> Path:
    """Move checkpoints to a new folder beside them, durably; returns it. The oldest goes last, so that a crash in the
    middle leaves a run that is only shorter."""
    aside = folder / free_name(os.listdir(folder))
    aside.mkdir()
    for name in sorted(names, reverse=True):
        path = folder / name
        if path.is_symlink():  # which may be relative to where it lies
            os.symlink(path.resolve(), aside / name)
            path.unlink()
        else:
            os.rename(path, aside / name)
    sync_folder(aside)
    sync_folder(folder)
    return aside


def list_committed(folder: Path) -> list[Path]:
    """List folders under their final names, newest step first. Whether each is good is `read_manifest`'s to say.

    Errors: CheckpointError if the folder is there and cannot be read.
    """
    found = []
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be looked into ({error.strerror or error})") from None
    for name in names:
        match = _COMMITTED.fullmatch(name)
        if match:
            found.append((int(match[1]), match[2] is None, name))
    return [folder / name for _, _, name in sorted(found, reverse=True)]


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder, with every file there in its full length.

    Errors: CorruptCheckpointError if it is not a whole checkpoint.
    """
    where = path / MANIFEST
    try:
        data = where.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{where}: {error.strerror or error}") from None
    manifest = decode(data, str(where))
    check_sizes(manifest, lambda name: _size(path / name), str(path))
    return manifest


def list_left_over(folder: Path) -> list[Path]:
    """List what interrupted saves and deletions left behind."""
    if not folder.is_dir():
        return []
    return [folder / name for name in sorted(os.listdir(folder)) if _LEFT_OVER.fullmatch(name)]


def remove_left_over(folder: Path) -> None:
    """Remove what interrupted saves and deletions left behind."""
    for path in list_left_over(folder):
        _delete(path)


def list_superseded(
    found: Sequence[tuple[int, str]], is_good: Callable[[str], bool], keep: int, keep_every: int
) -> list[str]:
    """List the checkpoints that retention gives up.

    Only good ones count towards `keep`, so the newest good one stays, whatever lies around it. What is no good, and a
    second attempt at a step, goes where a newer good one exists.

    Args:
        found: (step, name), newest step first, of one step the attempt to prefer first.
        is_good: whether a checkpoint's manifest verifies; asked of no more than are needed.
        keep: newest steps to keep; 0: all.
        keep_every: multiples of it are kept, too; 0: none.
    """
    good: set[int] = set()
    gone = []
    for step, name in found if keep else ():
        if step in good:
            gone.append(name)
        elif len(good) >= keep:
            if not (keep_every and step % keep_every == 0):
                gone.append(name)
        elif is_good(name):
            good.add(step)
        elif good:
            gone.append(name)
    return gone


def delete_superseded(folder: Path, keep: int, keep_every: int, up_to: int | None = None) -> list[str]:
    """Delete what `list_superseded` says of the steps up to `up_to` (None: of all); returns the names of the deleted."""

    def is_good(name: str) -> bool:
        try:
            read_manifest(folder / name)
            return True
        except CorruptCheckpointError:
            return False

    found = [(parse_step(path), path.name) for path in list_committed(folder)]
    found = [(step, name) for step, name in found if up_to is None or step <= up_to]
    doomed = list_superseded(found, is_good, keep, keep_every)
    for name in doomed:
        remove(folder / name)
    return doomed


def parse_step(path: Path) -> int:
    """Parse the step in a checkpoint folder's name; CheckpointError for other names."""
    match = _COMMITTED.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path.name!r} is no name of a checkpoint (step-00000100)")
    return int(match[1])


def _delete(path: Path) -> None:
    """A folder with what is in it, or a link or file by itself; what cannot be deleted now stays for the next time."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        written = os.write(descriptor, data)
        if written == 0:
            raise OSError(errno.EIO, "the file system took none of the bytes of a write")
        data = data[written:]


def _begin_writeback(descriptor: int, start: int, length: int) -> None:
    """Let the disk work on what was written so far; only a hint, which not every system takes."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
