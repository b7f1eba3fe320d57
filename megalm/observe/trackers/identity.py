"""Which run of a tracker's a folder is: kept beside the run, so that what goes on is shown as the same run."""

from __future__ import annotations

import json
from pathlib import Path

from megalm.config.writing import write_whole


def recall_run(folder: Path, tracker: str) -> str | None:
    """The id under which the tracker knows the run of this folder; None for the first start."""
    try:
        return str(json.loads((folder / "tracking" / f"{tracker}.json").read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError):
        return None


def remember_run(folder: Path, tracker: str, run_id: str, address: str) -> None:
    """Keep the id, and where the run can be looked at."""
    file = folder / "tracking" / f"{tracker}.json"
    file.parent.mkdir(exist_ok=True)
    write_whole(file, json.dumps({"run_id": run_id, "address": address}) + "\n")
