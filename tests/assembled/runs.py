"""The product as a user starts it: `python -m megalm.launch` in a process of its own, and what that left behind.

A start costs some seconds of imports, so a test asks one run several questions. The model is the smallest that can learn
something; everything that a user's run has attached (console, metrics, TensorBoard, report, guard, checkpoints) is.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.small_run import small_run

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10
"""A start that hangs fails its test after so long; no test depends on how fast it is."""

FROM_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Run:
    """How a start ended, what it said, and its folder."""

    folder: Path
    status: int
    shown: str
    """Of standard output."""
    errors: str
    """Of standard error."""

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in the order that they were written in."""
        return json_lines(self.folder / "metrics.jsonl")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl: of all starts in this folder."""
        return json_lines(self.folder / "events.jsonl")

    @cached_property
    def report(self) -> str:
        """The text of report.html."""
        return (self.folder / "report.html").read_text(encoding="utf-8")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.events if event["kind"] == kind]

    def log(self, rank: int = 0) -> str:
        """The text of a rank's log."""
        return (self.folder / f"logs/rank-{rank}.log").read_text(encoding="utf-8")

    def ended_well(self, status: int = 0) -> "Run":
        """The run itself, after asserting its exit status, and that nobody saw a traceback."""
        assert self.status == status, f"status {self.status}\n{self.shown}\n{self.errors}"
        assert "Traceback" not in self.shown + self.errors, self.shown + self.errors
        return self


def train(folder: Path, *overrides: str, ranks: int = 1, environment: dict[str, str] | None = None) -> Run:
    """Start a small run as a user does and wait for its end; the same folder again goes on with it.

    Later overrides win over those of `small_run`. `environment` is added to this process' own.
    """
    words = [*small_run(folder, f"world_size={ranks}", "train.sample=false"), *overrides]
    status, shown, errors = start("megalm.launch", *words, environment=environment)
    given = dict(word.split("=", 1) for word in words)
    return Run(Path(given["run.dir"]) / given["run.name"], status, shown, errors)


def start(module: str, *words: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """`python -m MODULE WORDS`, to its end: (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env={**surroundings(), **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    return done.returncode, done.stdout, done.stderr


def surroundings() -> dict[str, str]:
    """The environment of a start: this process' without what another launcher left, and one thread a process."""
    kept = {k: v for k, v in os.environ.items() if k not in FROM_A_LAUNCHER and not k.startswith("SLURM_")}
    return {"OMP_NUM_THREADS": "1", **kept, "PYTHONPATH": str(ROOT)}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, read strictly: each line whole, and no NaN or Infinity, which JSON does not have."""
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text(encoding="utf-8").splitlines()]


def refuse_constant(name: str) -> None:
    """Called for the words that Python's json reads and JSON does not have."""
    raise ValueError(f"{name} is not JSON")
