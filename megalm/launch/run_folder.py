"""A run's folder: where it is, and what is said where the file system refuses it."""

from contextlib import suppress
from pathlib import Path

from megalm.config import Config, ConfigError
from megalm.config.writing import explain_failed_writes
from megalm.launch.lock import FolderLock

LOGS = "logs"


def run_folder(config: Config) -> Path:
    """Name the run's folder: runs/NAME."""
    return Path(config.run.dir) / config.run.name


def log_file(folder: Path, rank: int) -> Path:
    """Name the file that a rank's log goes to."""
    return folder / LOGS / f"rank-{rank}.log"


def write_stacks(folder: Path, attempt: int, stacks: dict[int, str]) -> list[Path]:
    """Write where each rank stood, line by line, when an attempt was stopped; returns the files."""
    files = []
    for rank, text in sorted(stacks.items()):
        file = folder / LOGS / f"stacks-{attempt}-rank-{rank}.txt"
        with suppress(OSError):  # a full disk keeps nobody from starting the ranks again
            file.write_text(text)
            files.append(file)
    return files


def make_run_folder(folder: Path) -> None:
    """Make the folder with its place for logs. Errors: ConfigError where it cannot be written."""
    with explain_failed_writes(folder):
        (folder / LOGS).mkdir(parents=True, exist_ok=True)


def remove_unused(folder: Path, run: str) -> None:
    """Remove a folder in which nothing was written: that of a start that was refused. What another process has stays."""
    lock = FolderLock(folder, run)
    if lock.path.exists():
        return
    with suppress(OSError, ConfigError):  # what holds something stays
        lock.acquire()
        try:
            inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
            for place in inside:
                _remove_empty_files(place)
                place.rmdir()
            _remove_empty_files(folder)
        finally:
            lock.release()
        folder.rmdir()


def _remove_empty_files(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_file() and not entry.is_symlink() and entry.stat().st_size == 0:
            entry.unlink()
