"""What a run was set to, attempt by attempt: `configs/0002-step-00000021.yaml` holds from step 21 on.

A run that is stopped and started again may go on with other settings. Each start that trains keeps its own, unless they
are the newest there; of a step that was made more than once the last attempt counts. Nothing is ever rewritten.
"""

import re
from pathlib import Path

from megalm.config.writing import explain_failed_writes, write_whole

CONFIG = "config.yaml"
"""The newest settings, under the run's folder."""
CONFIGS = "configs"
_NAME = re.compile(r"(\d+)-step-(\d+)\.yaml")


def keep_attempt(folder: Path, text: str, first_step: int) -> None:
    """Keep an attempt's settings, which are in force from `first_step` on, and make them the run's newest."""
    with explain_failed_writes(folder):
        known = _attempts(folder)
        if not known or known[-1][1] > first_step or _read(known[-1][2]) != text:
            number = known[-1][0] + 1 if known else 1
            path = folder / CONFIGS / f"{number:04}-step-{first_step:08}.yaml"
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text)
        if _read(folder / CONFIG) != text:
            write_whole(folder / CONFIG, text)


def has_attempts(folder: Path) -> bool:
    """Whether the run's settings are kept attempt by attempt (those of earlier versions are not)."""
    return bool(_attempts(folder))


def find_config_of_step(folder: Path, step: int) -> Path:
    """Find the file with the settings that made a step the last time, or would make it."""
    fitting = [path for _, first, path in _attempts(folder) if first <= step]
    return fitting[-1] if fitting else folder / CONFIG


def _attempts(folder: Path) -> list[tuple[int, int, Path]]:
    """(number, first step, file), in the order in which they were made."""
    found = []
    for path in (folder / CONFIGS).glob("*.yaml"):
        if match := _NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else None
