"""A run's folder: where it is, and what is said where the file system refuses it."""

from contextlib import suppress
from pathlib import Path

from megalm.config import Config
from megalm.config.writing import explain_failed_writes

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


def remove_unused(folder: Path) -> None:
    """Remove a folder in which nothing was written: that of a start that was refused."""
    with suppress(OSError):  # what holds something stays
        inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
        for place in (*inside, folder):
            for entry in list(place.iterdir()):
                if entry.is_file() and not entry.is_symlink() and entry.stat().st_size == 0:
                    entry.unlink()
            place.rmdir()
