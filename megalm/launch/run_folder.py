"""A run's folder: where it is, and what is said where the file system refuses it."""

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


def error_file(folder: Path, rank: int) -> Path:
    """Name the file in which a rank that refuses the configuration leaves its message for the process that started it."""
    return folder / LOGS / f"error-rank-{rank}.json"


def error_files(folder: Path) -> list[Path]:
    """Find the messages that ranks left, in the order of their names."""
    return sorted((folder / LOGS).glob("error-rank-*.json"))


def make_run_folder(folder: Path) -> None:
    """Make the folder with its place for logs. Errors: ConfigError where it cannot be written."""
    with explain_failed_writes(folder):
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
