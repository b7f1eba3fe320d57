"""One run at a time writes into a folder: `run.lock` in it says who.

    held by a live process of this machine      an OS lock (flock) on the file, which the kernel drops however a process ends
    left by a dead one of this machine          the lock is free: taken over
    of another machine (a shared file system)   where OS locks do not cross, the holder's sign of life counts: it touches the
                                                file every BEAT_S; who wants it watches, and takes it over after SILENCE_S

The file holds one JSON object (host, process, boot, since, run, token) and goes when the run ends. Two machines that take
over one stale file at once write it both and look again after SETTLE_S: the last writer has it.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from megalm.config import ConfigError
from megalm.config.writing import explain_failed_writes

LOCK = "run.lock"
BEAT_S = 10.0
SILENCE_S = 45.0
"""Four beats and a half: a holder that a full disk or a stopped file system delays is not taken for dead at once."""
SETTLE_S = 1.0
FORGOTTEN_S = 600.0
"""A sign of life so long ago is none, however wrong the machines' clocks are: nobody need watch."""
HANDOVER_S = 1.0
"""How long a lock may take to come free: a process that just died, or one that only looked."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, as the file says."""

    host: str
    process: int
    boot: str
    """The kernel's own number: tells machines apart whatever containers call themselves."""
    since: str
    run: str
    token: str
    """Of this one holding; no two are the same."""

    def describe(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class FolderLock:
    """Holds a folder for this process, from `acquire` to `release` or to the process' end."""

    def __init__(self, folder: Path, run: str, *, key: str = "run.name", patience_s: float = SILENCE_S) -> None:
        """key: the setting that chooses another folder; patience_s: how long another machine's silence is watched."""
        self.path, self.key, self.patience_s = folder / LOCK, key, patience_s
        self.own = Holder(
            socket.gethostname(),
            os.getpid(),
            _boot(),
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            run,
            uuid.uuid4().hex,
        )
        self._descriptor: int | None = None
        self._ended = threading.Event()

    def acquire(self) -> Holder | None:
        """Take the folder; returns the dead holder that it was taken over from, if there was one.

        Errors: ConfigError where another process has it, or it cannot be written.
        """
        with explain_failed_writes(self.path.parent, key=self.key):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    crossing = self._lock(descriptor)
                    if not _is_named(descriptor, self.path):
                        continue  # removed by whoever had it, between our opening and our locking it
                    former = self._take(descriptor, crossing)
                    self._descriptor, descriptor = descriptor, -1
                    break
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)
        threading.Thread(target=self._beat, name="run.lock", daemon=True).start()
        return former

    @property
    def descriptor(self) -> int | None:
        """The open file that the lock is on, while it is held; a process that has it too holds the folder with us."""
        return self._descriptor

    def release(self) -> None:
        """Give the folder back; the file goes."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        self._ended.set()
        with suppress(OSError):
            if _is_named(descriptor, self.path):
                self.path.unlink()
        os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        """Take the OS lock; False where the file system has none. Errors: ConfigError where another process has it."""
        deadline = time.monotonic() + HANDOVER_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._refusal(read_holder(self.path)) from None
                time.sleep(0.05)
            except OSError:  # ENOLCK, ENOTSUP, ENOSYS, EINVAL: the record alone must do
                return False

    def _take(self, descriptor: int, locked: bool) -> Holder | None:
        """Write our record in place of a dead holder's. Errors: ConfigError where that one lives."""
        former = read_holder(self.path)
        here = former is not None and _is_this_machine(former)
        if former is not None and not (here and locked):
            alive = _runs(former.process) if here else self._shows_life()
            if alive:
                raise self._refusal(former)
        text = json.dumps(asdict(self.own)).encode() + b"\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
        os.fsync(descriptor)
        if not locked or (former is not None and not here):
            time.sleep(SETTLE_S)
            now = read_holder(self.path)
            if now is None or now.token != self.own.token:
                raise self._refusal(now)
        return former

    def _shows_life(self) -> bool:
        """True once another machine's process touches the file. Opened each time: a shared file system then asks its server."""
        first = _touched(self.path)
        if time.time() - first > FORGOTTEN_S:
            return False
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.patience_s / 5))
            if _touched(self.path) != first:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            if (descriptor := self._descriptor) is not None:
                with suppress(OSError):
                    os.utime(descriptor)

    def _refusal(self, holder: Holder | None) -> ConfigError:
        folder = self.path.parent
        if holder is None:
            return ConfigError(
                f"another process has just taken {folder}: only one may write there. Give another {self.key}."
            )
        way = f"stop it (kill {holder.process})" if _is_this_machine(holder) else "stop it there"
        text = f"{folder} is in use: {holder.describe()} (run {holder.run}). Wait for its end, {way}, or give another {self.key}."
        if not _is_this_machine(holder):
            text += f" If you know that it is gone, remove {self.path} and start again."
        return ConfigError(text)


def refuse_if_held(folder: Path, run: str) -> None:
    """Look before anything is started: ConfigError where a process of this machine holds the folder now."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        if (holder := read_holder(path)) is not None:
            raise FolderLock(folder, run)._refusal(holder) from None
    except OSError:
        return
    finally:
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """Read who a lock file says holds it; None where there is no file, or nothing in it can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**{field.name: field.type(values[field.name]) for field in fields(Holder)})  # type: ignore[operator]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_this_machine(holder: Holder) -> bool:
    return holder.boot == _boot() if holder.boot else holder.host == socket.gethostname()


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()


def _is_named(descriptor: int, path: Path) -> bool:
    """True while the open file is the one under this name: a holder that gave it back has removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _touched(path: Path) -> float:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
