"""Several runs from one command line: `megalm train -m +model=tiny optim.lr=1e-3,2e-3 train.seed=range(1,4)`.

Each combination of the values is a run of its own in runs/NAME/, named after what differs (`lr-1e-3_seed-1`), a process of
its own with the rest of the words, in turn or `--jobs N` at a time. The same command again goes on: runs that are complete
say so within seconds, others continue from their checkpoints.
"""

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.journal import encode_json, read_course, read_number
from megalm.launch.options import Options
from megalm.launch.run_folder import make_run_folder

RECORD = "sweep.json"
"""Under the sweep's folder: its runs, with the words that differ."""
LOG = "launch.log"
"""Under a run's folder: what its start printed."""
MOST_RUNS = 1000
WRONG_INPUT = 2
INTERRUPTED = 130
WAIT_S = 0.2


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    name: str
    differing: dict[str, str]
    """Key -> value, of the keys that the sweep varies."""


def expand(words: Sequence[str]) -> tuple[list[str], list[SweptRun]]:
    """Words that all runs share, and the runs.

    Several values stand with commas between them outside brackets and quotation marks, or as range(first, behind[, step]).
    Errors: ConfigError where nothing varies, a key varies twice, a value is empty, or there are too many runs.
    """
    shared: list[str] = []
    varied: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        values = list(_values(value)) if equals else []
        if len(values) < 2:
            shared.append(word)
            continue
        if key in varied:
            raise ConfigError(f"{word}: {key} varies twice. Give all its values in one word.")
        if not all(values):
            raise ConfigError(f"{word}: a value is empty: two commas follow each other, or one ends the word.")
        varied[key] = values
    if not varied:
        raise ConfigError(
            "-m makes a run for each of several values, and no word has several: write for example "
            "optim.lr=1e-3,2e-3 or train.seed=range(1,4)."
        )
    combinations = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    if len(combinations) > MOST_RUNS:
        raise ConfigError(f"the values make {len(combinations)} runs, more than {MOST_RUNS}: give fewer of them.")
    runs = [SweptRun(_name(each), each) for each in combinations]
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError("two of the runs would have one name: values differ in what a folder's name cannot show.")
    return shared, runs


def sweep(options: Options, command: Callable[[list[str]], list[str]]) -> int:
    """Make every run. Exit status: 0 when all ended well, 130 when interrupted, else the first run's that did not.

    command: the process that trains with given words.
    Errors: ConfigError, before anything is started, for a combination whose configuration is wrong.
    """
    shared, runs = expand(options.words)
    first = None
    for run in runs:
        config = compose_config([*shared, *_assigned(run)])
        first = first or config
    assert first is not None
    folder = Path(first.run.dir) / first.run.name
    with explain_failed_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        record = {"shared": shared, "runs": [{"name": run.name, **run.differing} for run in runs]}
        write_whole(folder / RECORD, encode_json(record, indent=2) + "\n")
    print(f"{len(runs)} runs in {folder}/, {options.jobs} at a time; each prints into its own {LOG}")
    statuses = _run_all(runs, folder, shared, options.jobs, command)
    print(tabulate_outcomes(runs, folder, statuses))
    print(f"compare them: megalm compare {folder}")
    failed = [status for status in statuses.values() if status]
    return INTERRUPTED if INTERRUPTED in failed else next(iter(failed), 0)


def tabulate_outcomes(runs: Sequence[SweptRun], folder: Path, statuses: dict[str, int]) -> str:
    """Tabulate what each run came to, the best held-out loss first (the training loss where nothing was held out)."""
    keys = list(runs[0].differing)
    rows = []
    for run in runs:
        steps = read_course(folder / run.name / "metrics.jsonl").steps
        loss, held_out = (_last(steps, key) for key in ("loss", "eval/loss"))
        made = steps[-1]["step"] if steps else 0
        status = statuses.get(run.name)
        ended = "not started" if status is None else "done" if status == 0 else f"status {status}"
        best = held_out if held_out is not None else loss
        cells = [*(run.differing[key] for key in keys), str(made), _loss(loss), _loss(held_out), ended]
        rows.append((float("inf") if best is None or best != best else best, cells))
    rows.sort(key=lambda row: row[0])
    table = [[*keys, "steps", "loss", "held-out", "ended"], *(cells for _, cells in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def _run_all(
    runs: Sequence[SweptRun], folder: Path, shared: list[str], jobs: int, command: Callable[[list[str]], list[str]]
) -> dict[str, int]:
    """Start the runs in their order, `jobs` at a time; an interrupt ends those that run, and starts no more."""
    waiting, statuses = list(runs), dict[str, int]()
    going: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    interrupted = False
    while going or waiting and not interrupted:
        try:
            while waiting and len(going) < jobs and not interrupted:
                run = waiting.pop(0)
                going[run.name] = _start(run, folder, shared, command), time.monotonic()
            for name, (process, begun) in list(going.items()):
                status = process.poll()
                if status is None:
                    continue
                del going[name]
                statuses[name] = status if status >= 0 else 128 - status
                print(
                    f"  {name}: {_ended(folder / name, statuses[name])}, {time.monotonic() - begun:.0f} s", flush=True
                )
                interrupted = interrupted or statuses[name] == INTERRUPTED
                if statuses[name] == WRONG_INPUT and set(statuses.values()) == {WRONG_INPUT} and waiting:
                    print(
                        f"  {len(waiting)} more are not started: the others' input is probably wrong, too", flush=True
                    )
                    waiting.clear()
            time.sleep(WAIT_S)
        except KeyboardInterrupt:  # the runs have it too, being of this process' group: they save and end
            if interrupted:
                for process, _ in going.values():
                    process.kill()
            interrupted = True
            print("  interrupted: the runs that are going save and end (once more: they end at once)", flush=True)
    return statuses


def _start(
    run: SweptRun, folder: Path, shared: list[str], command: Callable[[list[str]], list[str]]
) -> subprocess.Popen[bytes]:
    place = folder / run.name
    make_run_folder(place)
    words = [*shared, *_assigned(run), f"run.dir={folder}", f"run.name={run.name}"]
    with (place / LOG).open("ab") as log:
        return subprocess.Popen(command(words), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def _ended(place: Path, status: int) -> str:
    if status == 0:
        steps = read_course(place / "metrics.jsonl").steps
        return f"done, loss {_loss(_last(steps, 'loss'))}"
    if status == INTERRUPTED:
        return "interrupted and saved"
    lines = (place / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"ended with status {status}: {lines[-1] if lines else 'it printed nothing'}"


def _assigned(run: SweptRun) -> list[str]:
    return [f"{key}={value}" for key, value in run.differing.items()]


def _last(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((number for step in reversed(steps) if (number := read_number(step.get(key))) is not None), None)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _values(text: str) -> Iterator[str]:
    """The values of a word, as they stand; one where there are no several."""
    counted = re.fullmatch(r"range\(\s*(-?\d+)\s*,\s*(-?\d+)\s*(?:,\s*(-?\d+)\s*)?\)", text)
    if counted:
        numbers = range(int(counted[1]), int(counted[2]), int(counted[3] or 1))
        if not numbers:
            raise ConfigError(f"{text}: holds no number. It goes from the first up to, and without, the second.")
        yield from map(str, numbers)
        return
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (place == start or depth):
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _name(differing: dict[str, str]) -> str:
    """Name a folder's name that says what differs: `lr-1e-3_seed-1`."""
    parts = []
    for key, value in differing.items():
        short = key.lstrip("+").rpartition(".")[2]
        parts.append(
            f"{short}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', Path(value).stem if '/' in value else value).strip('-')}"
        )
    return "_".join(parts)


def train_command(words: list[str]) -> list[str]:
    """The process that trains with these words."""
    return [sys.executable, "-m", "megalm.launch", *words]
